"""Reads GPTQ and AWQ files from their definitions, number by number, onto a float model of transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ptqcore import QuantizedTensor, QuantLinear, QuantSpec

Codes = list[list[int]]


def unpack(words: list[int], bits: int, n: int) -> list[int]:
    """n codes of a row of int32 words: the row is one number, lowest word first, and so are the codes."""
    number = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
    return [number >> bits * j & 2**bits - 1 for j in range(n)]


def gptq_weight(tensors: dict[str, Tensor], name: str, bits: int, version: int) -> Tensor:
    """Weight [out, in] of a GPTQ layer, float64."""
    groups = tensors[f"{name}.g_idx"].tolist()
    scales = tensors[f"{name}.scales"].double().tolist()
    out, columns = len(scales[0]), len(groups)
    rows = [unpack(words, bits, columns) for words in tensors[f"{name}.qweight"].T.tolist()]
    zeros = [unpack(words, bits, out) for words in tensors[f"{name}.qzeros"].tolist()]
    short = {1: 1, 2: 0}[version]
    return torch.tensor(
        [
            [(rows[o][i] - zeros[groups[i]][o] - short) * scales[groups[i]][o] for i in range(columns)]
            for o in range(out)
        ],
        dtype=torch.float64,
    )


def awq_weight(tensors: dict[str, Tensor], name: str, group_size: int) -> Tensor:
    """Weight [out, in] of an AWQ layer, float64."""
    scales = tensors[f"{name}.scales"].double().tolist()
    codes, zeros = (_awq_codes(tensors[f"{name}.{kind}"]) for kind in ("qweight", "qzeros"))
    columns, out = len(codes), len(codes[0])
    return torch.tensor(
        [
            [(codes[i][o] - zeros[i // group_size][o]) * scales[i // group_size][o] for i in range(columns)]
            for o in range(out)
        ],
        dtype=torch.float64,
    )


def _awq_codes(words: Tensor) -> Codes:
    """Nibble k of word c is column 8·c + (0, 2, 4, 6, 1, 3, 5, 7)[k]."""
    rows = []
    for row in words.tolist():
        codes = [0] * (8 * len(row))
        for c, word in enumerate(row):
            for k, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                codes[8 * c + column] = word >> 4 * k & 15
        rows.append(codes)
    return rows


def load_plain(folder: Path, weight: Callable[[dict[str, Tensor], str], Tensor]) -> PreTrainedModel:
    """The float model that config.json describes, with the weights of the file.

    Args:
        folder: config.json and model.safetensors.
        weight: makes the weight [out, in] of a quantized layer from the file's tensors.
    """
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    quantized = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    state = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] not in quantized}
    state |= {f"{name}.bias": tensors[f"{name}.bias"] for name in quantized if f"{name}.bias" in tensors}
    dtype = tensors["model.embed_tokens.weight"].dtype
    state |= {f"{name}.weight": weight(tensors, name).to(dtype) for name in quantized}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    report = model.load_state_dict(state, strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys == (["lm_head.weight"] if config["tie_word_embeddings"] else [])
    return model.eval()


def random_layer(
    spec: QuantSpec, out: int, columns: int, seed: int = 0, least_zero: int = 0
) -> QuantLinear:
    """A float32 layer of random codes, scales that float16 holds, and zero points from `least_zero` on."""
    random = torch.Generator().manual_seed(seed)
    layer = QuantLinear(torch.nn.Linear(columns, out, bias=False), spec, None)
    layout = layer.weight_scale.shape
    codes = torch.randint(0, spec.levels + 1, (out, columns), generator=random, dtype=torch.uint8)
    scale = torch.randn(layout, generator=random).half().float()
    zero = torch.randint(least_zero, spec.levels + 1, layout, generator=random).float()
    record = QuantizedTensor(codes, scale, None if spec.symmetric else zero, spec, (out, columns))
    layer.set_weight(record)
    return layer
