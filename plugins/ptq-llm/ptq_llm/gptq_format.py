"""The GPTQ format in both versions: what transformers, GPTQModel, vLLM and SGLang load."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ptq_llm.checkpoint import CheckpointExporter, write_json
from ptq_llm.gptq_config import Scheme, quantization_config
from ptq_llm.half_scales import (
    Capacity,
    half,
    in_a_block,
    rounding_notes,
    weight_difference,
    zero_points,
)
from ptq_llm.unpack import TensorFile
from ptq_llm.unpack_gptq import Layout, read_weight
from ptqcore import ExportError, QuantLinear, QuantSection, pack_bits


class GPTQ(CheckpointExporter[Layout]):
    """Integer weights of 2, 3, 4 or 8 bits with zero points less one: version 1, the most portable.

    It cannot hold the zero point 0. transformers loads it through optimum and GPTQModel, with one scheme
    for the whole model; vLLM runs symmetric weights of 4 and 8 bits; GPTQModel's own loader takes
    symmetric weights alone, and asymmetric ones in version 2.

    Scales may be negative (`signed_scale`): kernels multiply by them as they are, and AutoRound writes
    such files by default. Only where vLLM is told to round inputs to 8 bits does Marlin take the largest
    scale for the largest in magnitude.
    """

    name = "gptq"
    version: ClassVar[int] = 1

    @property
    def _capacity(self) -> Capacity:
        return Capacity(
            self.name,
            bits=(2, 3, 4, 8),
            granularities=("channel", "group"),
            group_sizes=(16, 32, 64, 128, 256, 512, 1024),
            inputs_multiple=32,
            outputs_multiple=32,
        )

    def check(self, quant: QuantSection) -> None:
        self._capacity.refuse(quant)

    def check_layer(self, quant: QuantSection, name: str, layer: nn.Linear) -> None:
        self._capacity.refuse_float(quant, name, layer)

    def refuse(self, model: nn.Module, layers: dict[str, QuantLinear]) -> None:
        for name, layer in layers.items():
            self._capacity.refuse_quantized(name, layer)
            stored = layer.weight_zero_point
            if self.version == 1 and stored is not None and bool((stored == 0).any()):
                raise ExportError(
                    f"export gptq stores zero points less one and cannot hold the 0 among those of {name}: "
                    "replace it by gptq-v2"
                )

    def layer_tensors(self, layer: QuantLinear) -> dict[str, Tensor]:
        """qweight int32 [in·bits/32, out], packed along the inputs; qzeros int32 [groups, out·bits/32],
        packed along the outputs; scales float16 [groups, out]; g_idx int32 [in], the group of an input."""
        record = layer.quantized_weight
        spec, size = record.spec, record.spec.group_size or layer.in_features
        return {
            "qweight": pack_bits(record.codes, spec.bits).T,
            "qzeros": pack_bits((zero_points(record) - (2 - self.version)).T, spec.bits),
            "scales": half(record.scale).T,
            "g_idx": torch.arange(layer.in_features, dtype=torch.int32) // size,
        }

    def quantization_config(self, model: nn.Module, layers: dict[str, QuantLinear]) -> dict[str, Any]:
        schemes: dict[str, Scheme | None] = {}
        for name, module in model.named_modules():
            if name in layers:
                schemes[name] = Scheme.of(layers[name].weight_spec)
            elif isinstance(module, nn.Linear) and in_a_block(name):
                schemes[name] = None
        return quantization_config(schemes, self.version)

    def write_config(self, folder: Path, quantization: dict[str, Any]) -> None:
        """config.json, and a copy of its `quantization_config` for readers that look there first."""
        super().write_config(folder, quantization)
        write_json(folder / "quantize_config.json", quantization)

    def find_layout(self, config: dict[str, Any], name: str) -> Layout | None:
        return Layout.find(config, name)

    def layer_difference(self, file: TensorFile, name: str, layer: QuantLinear, layout: Layout) -> float:
        shape = (layer.out_features, layer.in_features)
        return weight_difference(read_weight(file, name, layout, shape), layer)

    def notes(self, layers: dict[str, QuantLinear]) -> tuple[str, ...]:
        return rounding_notes(layers)


class GPTQv2(GPTQ):
    """The same with zero points as they are: version 2, for asymmetric weights in GPTQModel."""

    name = "gptq-v2"
    version = 2
