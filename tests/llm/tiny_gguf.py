"""Grids that GGUF holds, exports of tiny models, and tokenizers: what the tests of GGUF share."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_lm
import torch
from tiny_llama import quantize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ptq_llm.gguf_export import FILE, GGUF
from ptqcore import QuantizedTensor, QuantLinear, QuantSpec, Verification

BLOCKS = {"granularity": "group", "group_size": 32, "scale_dtype": "float16"}
Q4_0 = QuantSpec(bits=4, **BLOCKS)
Q4_0_SIGNED = QuantSpec(bits=4, signed_scale=True, **BLOCKS)
Q4_1 = QuantSpec(bits=4, symmetric=False, **BLOCKS)
Q8_0 = QuantSpec(bits=8, **BLOCKS)
TEXT = "The quick brown fox, it's 12345 o'clock!\n\n  Isn't I'LL\tsee naïve café 你好 🙂 x**2 = 3.14"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names of rules that split text, and the expressions of tokenizers that have them.
SPLITS = {
    "gpt-2": (),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),),
    "tekken": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}


def keep_binary_digits(scale: Tensor, digits: int) -> Tensor:
    """Scales rounded to so many significant binary digits."""
    mantissa, exponent = torch.frexp(scale.double())
    return torch.ldexp(torch.round(mantissa * 2**digits) / 2**digits, exponent).to(scale.dtype)


def with_exact_minima(model: nn.Module) -> nn.Module:
    """The model with scales of 7 binary digits: times a zero point they have 11, as float16."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            record = layer.quantized_weight
            scale = keep_binary_digits(record.scale, 7)
            layer.set_weight(
                QuantizedTensor(record.codes, scale, record.zero_point, record.spec, record.shape)
            )
    return model


def quantized(architecture: str = "llama", spec: QuantSpec = Q4_0, **changes: Any) -> PreTrainedModel:
    """A tiny model with quantized linear layers in its blocks; Qwen3 with the heads of real ones."""
    shape = {"head_dim": 128} if architecture == "qwen3" else {}
    return quantize(tiny_lm.build(architecture, **(shape | changes)), spec)


def task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> SimpleNamespace:
    """What an exporter asks of a task: configuration and tokenizer."""

    def save_assets(folder: Path) -> None:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return SimpleNamespace(save_assets=save_assets)


def export(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> None:
    GGUF().export(model, task(model, tokenizer or tiny_lm.tokenizer()), [], folder)


def verify(model: PreTrainedModel, folder: Path, tokenizer: Any = None) -> Verification:
    return GGUF().verify(model, task(model, tokenizer or tiny_lm.tokenizer()), [], folder)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """The model that transformers makes of an exported file; nothing may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, output_loading_info=True, **({"dtype": torch.float32} | options)
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def logits(model: nn.Module, length: int = 8) -> Tensor:
    tokens = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits.float()


def byte_level_tokenizer(
    *splits: str, text: str = TEXT, special: tuple[str, ...] = ("<end>",)
) -> PreTrainedTokenizerFast:
    """A tokenizer with merges, learned on a text that is split by those expressions first."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0])


def sentencepiece_tokenizer() -> LlamaTokenizer:
    """As Llama 2 has it: words begin with ▁, and what is not in the vocabulary is spelt in bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    words = "the quick brown fox jumps over the lazy dog and hello world it's 12345 clock"
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator([words] * 5, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True)
