"""The AWQ format in GEMM packing: what transformers (through GPTQModel), vLLM and SGLang load."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

from ptq_llm.checkpoint import CheckpointExporter, float_linears
from ptq_llm.half_scales import Capacity, half, rounding_notes, weight_difference, zero_points
from ptq_llm.unpack import TensorFile
from ptq_llm.unpack_awq import Layout, read_weight
from ptqcore import ExportError, QuantLinear, QuantSection, pack_bits

_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight output columns the nibbles of a word hold, lowest first
_CAPACITY = Capacity(
    "awq",
    bits=(4,),
    granularities=("group",),
    group_sizes=(16, 32, 64, 128),
    inputs_multiple=1,
    outputs_multiple=8,
)


class AWQ(CheckpointExporter[Layout]):
    """Integer weights of 4 bits in groups of one size, with zero points.

    Symmetric weights are stored with the zero point 8. Scales may be negative (`signed_scale`): kernels
    multiply by them as they are, and AutoRound writes such files by default. Only where vLLM is told to
    round inputs to 8 bits does Marlin take the largest scale for the largest in magnitude.
    """

    name = "awq"

    def check(self, quant: QuantSection) -> None:
        _CAPACITY.refuse(quant)

    def check_layer(self, quant: QuantSection, name: str, layer: nn.Linear) -> None:
        _CAPACITY.refuse_float(quant, name, layer)

    def refuse(self, model: nn.Module, layers: dict[str, QuantLinear]) -> None:
        sizes: dict[int | None, str] = {}
        for name, layer in layers.items():
            _CAPACITY.refuse_quantized(name, layer)
            sizes.setdefault(layer.weight_spec.group_size, name)
        if len(sizes) > 1:
            (size, first), (other, second), *_ = sizes.items()
            raise ExportError(
                f"export awq holds one group size for all layers, but {first} has {size} and {second} has "
                f"{other}: give them one, or export gptq"
            )

    def plain_tensors(
        self, model: nn.Module, layers: dict[str, QuantLinear]
    ) -> Iterator[tuple[str, Tensor]]:
        """Also the scales, all 1, of the activations that readers of AWQ files divide by."""
        yield from super().plain_tensors(model, layers)
        yield from _activation_scales(model)

    def layer_tensors(self, layer: QuantLinear) -> dict[str, Tensor]:
        """qweight int32 [in, out/8] and qzeros int32 [groups, out/8], both packed along the outputs;
        scales float16 [groups, out]."""
        record = layer.quantized_weight
        return {
            "qweight": _pack(record.codes.T),
            "qzeros": _pack(zero_points(record).T),
            "scales": half(record.scale).T,
        }

    def quantization_config(self, model: nn.Module, layers: dict[str, QuantLinear]) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": next(iter(layers.values())).weight_spec.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": float_linears(model),
        }

    def find_layout(self, config: dict[str, Any], name: str) -> Layout | None:
        return Layout.find(config, name)

    def layer_difference(self, file: TensorFile, name: str, layer: QuantLinear, layout: Layout) -> float:
        shape = (layer.out_features, layer.in_features)
        return weight_difference(read_weight(file, name, layout, shape), layer)

    def notes(self, layers: dict[str, QuantLinear]) -> tuple[str, ...]:
        return rounding_notes(layers)


def _pack(codes: Tensor) -> Tensor:
    """Words int32 [rows, out/8] of codes uint8 [rows, out]."""
    eights = codes.reshape(len(codes), -1, len(_ORDER))
    return pack_bits(eights[..., _ORDER].flatten(1), bits=4)


def _activation_scales(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and ones [out] for each activation that transformers replaces when it loads an AWQ file.

    In architectures whose activation stands between two layers without a norm, AWQ may scale there.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in AWQ_SCALES_MAPPINGS:
        return
    activation, before = (AWQ_SCALES_MAPPINGS[kind][key] for key in ("act", "layer_before_act"))
    dtype = next(model.parameters()).dtype
    for name, module in model.named_modules():
        if hasattr(module, before) and activation in dict(module.named_children()):
            size = getattr(module, before).out_features
            yield f"{name}.{activation}.scales", torch.ones(size, dtype=dtype)
