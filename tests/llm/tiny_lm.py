"""Tiny random language models as folders in Hugging Face format, with a byte-level tokenizer and texts."""

import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from zoo import END, POSITIONS, VOCABULARY, build

from ptqcore.recipe import Recipe, validate

__all__ = ["END", "POSITIONS", "VOCABULARY", "build"]

# Names in the zoo whose whole way from folder to export is tested.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2")


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


def recipe(
    model: Path, folder: Path, quant: Any = None, steps: Any = ("round",), export: Any = (), **task: Any
) -> Recipe:
    """A recipe for a model folder and a text that is written into another: 4 bits in groups of 32."""
    text = str(write_text(folder / "text.txt", 400))
    small = {"window": 32, "max_windows": 4, "calibration_window": 32, "calibration_samples": 2}
    given = {"kind": "causal-lm", "model": str(model), "text": text, "calibration": text}
    weights = {"bits": 4, "granularity": "group", "group_size": 32}
    data = {
        "name": "tiny",
        "task": given | small | task,
        "quant": {"weights": weights} | (quant or {}),
        "steps": list(steps),
        "export": list(export),
    }
    return validate(Recipe, data)
