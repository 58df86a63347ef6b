"""Tiny random language models as folders in Hugging Face format, with a byte-level tokenizer and texts."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 257  # the 256 bytes, and the end-of-text token
END = 256
POSITIONS = 256

_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.16,  # the output of a layer is as large as its input: logits of a few units
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

# model type → what its configuration has beside the common shape
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {"layer_types": _ALTERNATING, "use_sliding_window": True, "sliding_window": 8},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"layer_types": _ALTERNATING, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"layer_types": _ALTERNATING, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {},
    "olmo2": {},
}


def build(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    """The model; the same arguments give the same weights."""
    config = AutoConfig.for_model(architecture, **(_SHAPE | ARCHITECTURES[architecture] | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; its id is its place in the alphabet, not its value."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def save(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A model folder; returns it."""
    build(architecture, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, tokens: int, seed: int = 0) -> Path:
    """A text file of so many tokens (bytes); returns it."""
    letters = random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz      ,.\n", k=tokens)
    file.write_text("".join(letters), encoding="utf-8")
    return file
