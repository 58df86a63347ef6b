"""The compressed-tensors format: what transformers and vLLM load as a quantized checkpoint."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_llm import checkpoint_names
from ptq_llm.checkpoint import (
    CheckpointExporter,
    difference,
    float_linears,
    plain_tensors,
    refuse_new_bias,
    refuse_ragged,
)
from ptq_llm.compressed_scheme import Scheme, format_of, quantization_config, refuse, refuse_experts
from ptq_llm.experts import ExpertBank
from ptq_llm.unpack import Layout, TensorFile, read_weight
from ptqcore import ExportError, QuantizedTensor, QuantLinear, QuantSection, pack_bits

_MIDDLE = 128  # what an unsigned 8-bit code is above the signed number that the format stores


class CompressedTensors(CheckpointExporter[Layout]):
    """Integer weights of 2 to 8 bits (packed), int8 weights and inputs, or FP8 e4m3.

    transformers loads every export; asymmetric weights, and Falcon, only with
    `quantization_config=CompressedTensorsConfig(dequantize=True)`, which takes one scheme for the
    whole model and ignores the inputs' grids. vLLM runs symmetric weights of any width, asymmetric
    ones of 4 and 8 bits, and inputs with one scale per token or one static scale.

    Experts are stored one by one, with the names of float checkpoints. transformers dequantizes them
    while it loads and leaves their inputs in floating point; vLLM runs packed ones of 4 and 8 bits.
    """

    name = "compressed-tensors"

    def check(self, quant: QuantSection) -> None:
        refuse((quant.weights.spec, None if quant.activations is None else quant.activations.spec))

    def check_layer(self, quant: QuantSection, name: str, layer: nn.Linear) -> None:
        refuse_ragged(self.name, name, layer.in_features, quant.weights.group_size)

    def check_expert(self, quant: QuantSection, name: str) -> None:
        refuse_experts(
            (quant.weights.spec, None if quant.activations is None else quant.activations.spec), name
        )

    def refuse(self, model: nn.Module, layers: dict[str, QuantLinear]) -> None:
        _refuse_experts(model)
        for name, layer in layers.items():
            refuse(_scheme(layer))
            refuse_new_bias(self.name, name, layer)
            refuse_ragged(self.name, name, layer.in_features, layer.weight_spec.group_size)
            inputs = layer.input_quantizer
            if inputs is not None and inputs.scale is not None and not torch.isfinite(inputs.scale).all():
                raise ExportError(f"export compressed-tensors: the input of {name} has no calibrated range")

    def layer_tensors(self, layer: QuantLinear) -> dict[str, Tensor]:
        record = layer.quantized_weight
        tensors = _packed(record) if format_of(_scheme(layer)) == "pack-quantized" else _eight_bits(record)
        per_tensor = record.spec.granularity == "tensor"
        tensors["weight_scale"] = record.scale.flatten() if per_tensor else record.scale
        inputs = layer.input_quantizer
        if inputs is not None and inputs.scale is not None:
            tensors["input_scale"] = inputs.scale
            if inputs.zero_point is not None:
                tensors["input_zero_point"] = (inputs.zero_point - _MIDDLE).to(torch.int8)
        return tensors

    def quantization_config(self, model: nn.Module, layers: dict[str, QuantLinear]) -> dict[str, Any]:
        schemes = {name: _scheme(layer) for name, layer in layers.items()}
        left = float_linears(model) + _routers(model)
        # transformers asks for paths in the model, vLLM for names in the checkpoint.
        ignored = dict.fromkeys([*left, *checkpoint_names.stored_paths(model, left)])
        return quantization_config(schemes, list(ignored))

    def stored_layers(self, model: nn.Module, layers: dict[str, QuantLinear]) -> dict[str, QuantLinear]:
        return checkpoint_names.stored_layers(model, layers)

    def plain_tensors(
        self, model: nn.Module, layers: dict[str, QuantLinear]
    ) -> Iterator[tuple[str, Tensor]]:
        yield from checkpoint_names.stored_tensors(model, dict(plain_tensors(model, layers))).items()

    def find_layout(self, config: dict[str, Any], name: str) -> Layout | None:
        return Layout.find(config, name)

    def layer_difference(self, file: TensorFile, name: str, layer: QuantLinear, layout: Layout) -> float:
        """Largest difference of a layer's weight, and of its input's grid if that is static."""
        weight = read_weight(file, name, layout, (layer.out_features, layer.in_features))
        # Not `layer.weight`, which the layer would keep: one float layer at a time is enough.
        largest = difference(weight, layer.quantized_weight.dequantize())
        inputs = layer.input_quantizer
        if inputs is not None and inputs.scale is not None:
            largest = max(largest, difference(file.numbers(f"{name}.input_scale", (1,)), inputs.scale))
            if inputs.zero_point is not None:
                signed = file.numbers(f"{name}.input_zero_point", (1,))
                largest = max(largest, difference(signed.astype(np.float32) + _MIDDLE, inputs.zero_point))
        return largest


def _refuse_experts(model: nn.Module) -> None:
    """Refuse mixtures of experts that readers would take for another.

    Raises:
        ExportError: naming an expert.
    """
    schemes: dict[Scheme, str] = {}
    for path, bank in checkpoint_names.banks_of(model).items():
        for index, layer in enumerate(bank):
            name = f"{path}.{index}"
            if not isinstance(layer, QuantLinear):
                raise ExportError(
                    f"export compressed-tensors cannot hold {name} in full precision: readers quantize all "
                    "experts, remove it from quant.ignore"
                )
            refuse_experts(_scheme(layer), name)
            schemes.setdefault(_scheme(layer), name)
    if len(schemes) > 1:
        first, second, *_ = schemes.values()
        raise ExportError(
            f"export compressed-tensors cannot hold {first} and {second} on different grids: readers take "
            "one for all experts"
        )


def _routers(model: nn.Module) -> list[str]:
    """Paths of modules that choose experts: readers may take their matrix for a linear layer's."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if any(isinstance(part, ExpertBank) for child in module.children() for part in child.children())
        for name, child in module.named_children()
        if isinstance(getattr(child, "weight", None), nn.Parameter) and not isinstance(child, nn.Linear)
    ]


def _scheme(layer: QuantLinear) -> Scheme:
    return layer.weight_spec, None if layer.input_quantizer is None else layer.input_quantizer.spec


def _packed(record: QuantizedTensor) -> dict[str, Tensor]:
    """Weight words int32 [out, ceil(in·bits/32)], zero points int32 [ceil(out·bits/32), groups].

    The format packs signed numbers plus 2^(bits−1): those are our unsigned codes and zero points.
    """
    bits = record.spec.bits
    tensors = {
        "weight_packed": pack_bits(record.codes, bits),
        "weight_shape": torch.tensor(record.shape, dtype=torch.int64),
    }
    if record.zero_point is not None:
        tensors["weight_zero_point"] = pack_bits(record.zero_point.to(torch.uint8).T, bits).T
    return tensors


def _eight_bits(record: QuantizedTensor) -> dict[str, Tensor]:
    """The weight [out, in] as FP8 or int8."""
    if record.spec.is_float:
        return {"weight": record.codes.view(torch.float8_e4m3fn)}
    return {"weight": (record.codes.to(torch.int16) - _MIDDLE).to(torch.int8)}
