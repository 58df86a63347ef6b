"""ONNX with packed weights: `com.microsoft.MatMulNBits`, the product of floats and narrow integers.

The operator is defined among the contributed operators of ONNX Runtime (docs/ContribOperators.md).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ptq_llm.checkpoint import refuse_ragged
from ptq_llm.onnx_unpack import largest_difference
from ptqcore import (
    ExportError,
    OnnxProduct,
    OnnxWeightOnly,
    QuantizedTensor,
    QuantLinear,
    QuantSection,
    QuantSpec,
    pack_bits,
)

_BITS = (2, 4, 8)
_SMALLEST_GROUP = 16


class OnnxMatMulNBits(OnnxWeightOnly):
    """A float32 network whose quantized linear layers are `MatMulNBits` nodes; the rest is standard ONNX.

    Weights: 2, 4 or 8 bits in groups of a power of two, at least 16; scales may be negative. The graph
    maps `input_ids` [batch, sequence] to logits `output` [batch, sequence, vocabulary]. It has no KV
    cache and no padding mask: it scores texts, and generates at the price of the whole text a token.

    The nodes leave `accuracy_level` at its default, sums in float32, which gives the logits of the
    quantized model; 4 lets ONNX Runtime round inputs to 8 bits for speed. OpenVINO reads the file too,
    and rounds inputs in that way unless DYNAMIC_QUANTIZATION_GROUP_SIZE is 0.
    """

    name = "onnx-matmulnbits"

    def check(self, quant: QuantSection) -> None:
        super().check(quant)
        _refuse(quant.weights.spec)

    def check_layers(self, quant: QuantSection, layers: dict[str, nn.Module]) -> None:
        super().check_layers(quant, layers)
        for path, layer in layers.items():
            refuse_ragged(self.name, path, layer.get_parameter("weight").shape[1], quant.weights.group_size)

    def product(self, path: str, layer: QuantLinear) -> OnnxProduct:
        spec = layer.weight_spec
        _refuse(spec)
        refuse_ragged(self.name, path, layer.in_features, spec.group_size)
        assert spec.group_size is not None
        attributes = {"K": layer.in_features, "N": layer.out_features}
        attributes |= {"bits": spec.bits, "block_size": spec.group_size}
        return OnnxProduct("MatMulNBits", "com.microsoft", _constants(layer.quantized_weight), attributes)

    def difference(self, path: Path, model: nn.Module) -> float:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
        return largest_difference(path, layers)


def _refuse(spec: QuantSpec) -> None:
    """Refuse weights that the operator cannot hold.

    Raises:
        ExportError: naming the key, its value and what to set instead.
    """
    size = spec.group_size
    problem = ""
    if spec.is_float:
        problem = f"integers, and quant.weights.dtype is {spec.dtype}: set it to int"
    elif spec.bits not in _BITS:
        problem = (
            f"weights of 2, 4 or 8 bits, and quant.weights.bits is {spec.bits}: set it to one of these"
        )
    elif size is None:
        problem = (
            f"weights in groups, and quant.weights.granularity is {spec.granularity}: set it to group, and "
            "quant.weights.group_size to 32, 64 or 128"
        )
    elif size < _SMALLEST_GROUP or size & (size - 1):
        problem = (
            f"groups of a power of two, at least {_SMALLEST_GROUP}, and quant.weights.group_size is "
            f"{size}: set it to 16, 32, 64 or 128"
        )
    if problem:
        raise ExportError(f"export {OnnxMatMulNBits.name} holds {problem}")


def _constants(record: QuantizedTensor) -> dict[str, np.ndarray]:
    """What the node reads beside its input, in its order, of a record [out, in].

    Codes uint8 [out, groups, group_size·bits/8], low bits first; scales float32 [out·groups]; if
    asymmetric, zero points uint8 [out·ceil(groups·bits/8)], each row filled up to whole bytes. Without
    zero points they are 2^(bits−1), as in the record.
    """
    bits, (rows, groups) = record.spec.bits, record.scale.shape
    codes = _bytes(record.codes.view(rows * groups, -1), bits).reshape(rows, groups, -1)
    constants = {"weight.codes": codes, "weight.scale": record.scale.cpu().numpy().ravel()}
    if record.zero_point is not None:
        zero_points = _bytes(record.zero_point.to(torch.uint8), bits)
        constants["weight.zero_point"] = zero_points[:, : -(-groups * bits // 8)].ravel()
    return constants


def _bytes(codes: Tensor, bits: int) -> np.ndarray:
    """Rows of codes as rows of bytes, filled up to whole words of 32 bits."""
    words = pack_bits(codes.cpu(), bits).numpy().astype("<i4")
    return words.view(np.uint8)
