"""The compressed-tensors format: what transformers and vLLM load as a quantized checkpoint."""

from collections.abc import Container, Iterator, Mapping
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
from ptq_llm.compressed_scheme import (
    PACKED,
    Scheme,
    format_of,
    has_packed_zero_points,
    quantization_config,
    refuse,
    refuse_experts,
    refuse_together,
)
from ptq_llm.experts import ExpertBank
from ptq_llm.unpack import Layout, TensorFile, read_weight
from ptqcore import (
    ExportError,
    QuantizedTensor,
    QuantLinear,
    QuantSection,
    QuantSpec,
    Task,
    TensorQuant,
    pack_bits,
)


class CompressedTensors(CheckpointExporter[Layout]):
    """Integer weights of 2 to 8 bits beside inputs in floating point (packed) or of 2 to 8 bits (as int8),
    and FP8 e4m3; scales per tensor, channel or group, inputs also per token.

    transformers (5.23 with compressed-tensors 0.20) loads every export and simulates the inputs' grids,
    except that asymmetric packed weights, and Falcon, load only with
    `quantization_config=CompressedTensorsConfig(dequantize=True)`, which takes one grid for the whole
    model and leaves inputs in floating point. Of half-precision models it rounds inputs in that precision,
    the simulation here in float32, so that some fall on the other side.

    vLLM runs symmetric weights of any width, asymmetric ones of 4 and 8 bits, 8-bit inputs with one scale
    per token or one static scale, and of the narrower ones those that its version has kernels for; layers
    that it joins (q, k and v; gate and up) must have one grid.

    Experts are stored one by one, with the names of float checkpoints. transformers dequantizes them
    while it loads and leaves their inputs in floating point; vLLM runs packed ones of 4 and 8 bits.

    Online rotations are refused like all attachments. The format has a place for them
    (`transform_config`, with matrices among the tensors), but transformers passes over it without a
    word, and computes something else.
    """

    name = "compressed-tensors"

    def check(self, quant: QuantSection) -> None:
        if quant.scope != "layers" and quant.activations is not None:
            raise ExportError(
                f"export {self.name} holds grids of the inputs of linear layers, and quant.scope is "
                f"{quant.scope}: set it to layers, or export onnx-qdq"
            )
        refuse(_wanted(quant))

    def check_layer(self, quant: QuantSection, name: str, layer: nn.Linear) -> None:
        _refuse_groups(name, layer.in_features, _wanted(quant))

    def check_expert(self, quant: QuantSection, name: str) -> None:
        refuse_experts(_wanted(quant), name)

    def check_model(self, model: nn.Module, task: Task, layers: Mapping[str, nn.Module]) -> None:
        _refuse_float_experts(model, layers)
        linears = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Linear)}
        checkpoint_names.stored_pieces(model, linears)

    def check_grids(self, quant: QuantSection, weights: Mapping[str, TensorQuant]) -> None:
        super().check_grids(quant, weights)
        _, inputs = _wanted(quant)
        refuse_together({(grid.spec, inputs): path for path, grid in weights.items()})

    def refuse(self, model: nn.Module, layers: dict[str, QuantLinear]) -> None:
        _refuse_float_experts(model, layers)
        _refuse_experts(model)
        refuse_together({_scheme(layer): name for name, layer in layers.items()})
        for name, layer in layers.items():
            refuse(_scheme(layer))
            refuse_new_bias(self.name, name, layer)
            _refuse_groups(name, layer.in_features, _scheme(layer))
            inputs = layer.input_quantizer
            if inputs is not None and inputs.scale is not None and not torch.isfinite(inputs.scale).all():
                raise ExportError(f"export compressed-tensors: the input of {name} has no calibrated range")

    def layer_tensors(self, layer: QuantLinear) -> dict[str, Tensor]:
        scheme, record = _scheme(layer), layer.quantized_weight
        tensors = _packed(record) if format_of(scheme) == PACKED else {"weight": _numbers(record)}
        per_tensor = record.spec.granularity == "tensor"
        tensors["weight_scale"] = record.scale.flatten() if per_tensor else record.scale
        if record.zero_point is not None:
            signed = _signed(record.zero_point, record.spec)
            tensors["weight_zero_point"] = signed.flatten() if per_tensor else signed
            if has_packed_zero_points(scheme):
                tensors["weight_zero_point"] = _packed_zero_points(record.zero_point, record.spec.bits)
        inputs = layer.input_quantizer
        if inputs is not None and inputs.scale is not None:
            tensors["input_scale"] = inputs.scale
            if inputs.zero_point is not None:
                tensors["input_zero_point"] = _signed(inputs.zero_point, inputs.spec)
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
        """Largest difference of a layer's weight, and of its input's grid if that is static.

        Raises:
            ExportError: if config.json says that either has another grid.
        """
        _check_grids(name, layer, layout)
        weight = read_weight(file, name, layout, (layer.out_features, layer.in_features))
        # Not `layer.weight`, which the layer would keep: one float layer at a time is enough.
        largest = difference(weight, layer.quantized_weight.dequantize())
        inputs = layer.input_quantizer
        if inputs is not None and inputs.scale is not None:
            largest = max(largest, difference(file.numbers(f"{name}.input_scale", (1,)), inputs.scale))
            if inputs.zero_point is not None:
                signed = file.numbers(f"{name}.input_zero_point", (1,)).astype(np.float32)
                largest = max(largest, difference(signed + inputs.spec.middle, inputs.zero_point))
        return largest


def _refuse_float_experts(model: nn.Module, layers: Container[str]) -> None:
    """Refuse mixtures of experts of which some are not among the layers that are quantized.

    Raises:
        ExportError: naming an expert.
    """
    for path, bank in checkpoint_names.banks_of(model).items():
        for index in range(len(bank)):
            if f"{path}.{index}" not in layers:
                raise ExportError(
                    f"export compressed-tensors cannot hold {path}.{index} in full precision: readers "
                    "quantize all experts, remove it from quant.ignore"
                )


def _refuse_experts(model: nn.Module) -> None:
    """Refuse mixtures of experts that readers would take for another.

    Raises:
        ExportError: naming an expert.
    """
    schemes: dict[Scheme, str] = {}
    for path, bank in checkpoint_names.banks_of(model).items():
        for index, layer in enumerate(bank):
            name = f"{path}.{index}"
            assert isinstance(layer, QuantLinear)  # `_refuse_float_experts` has seen to that
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


def _wanted(quant: QuantSection) -> Scheme:
    return quant.weights.spec, None if quant.activations is None else quant.activations.spec


def _check_grids(name: str, layer: QuantLinear, layout: Layout) -> None:
    """Compare the grids of a layer with what config.json says.

    Raises:
        ExportError: naming the layer.
    """
    pairs = zip(("weight", "input"), (layout.weights, layout.inputs), _scheme(layer), strict=True)
    for what, grid, spec in pairs:
        if not (grid is None if spec is None else grid is not None and grid.describes(spec)):
            raise ExportError(
                f"config.json says that the grid of the {what} of {name} is {grid}, but it is {spec}"
            )


def _refuse_groups(name: str, columns: int, scheme: Scheme) -> None:
    """Refuse a layer whose row, or input, groups do not fill."""
    weights, inputs = scheme
    refuse_ragged(CompressedTensors.name, name, columns, weights.group_size)
    if inputs is not None:
        key = "quant.activations.group_size"
        refuse_ragged(CompressedTensors.name, name, columns, inputs.group_size, key)


def _packed(record: QuantizedTensor) -> dict[str, Tensor]:
    """Weight words int32 [out, ceil(in·bits/32)] and the shape that they have unpacked.

    The format packs signed numbers plus 2^(bits−1): those are our unsigned codes and zero points.
    """
    return {
        "weight_packed": pack_bits(record.codes, record.spec.bits),
        "weight_shape": torch.tensor(record.shape, dtype=torch.int64),
    }


def _packed_zero_points(zero_points: Tensor, bits: int) -> Tensor:
    """Words int32 [ceil(out·bits/32), groups] of zero points [out, groups]."""
    return pack_bits(zero_points.to(torch.uint8).T, bits).T


def _numbers(record: QuantizedTensor) -> Tensor:
    """The weight [out, in] as FP8 or int8."""
    if record.spec.is_float:
        return record.codes.view(torch.float8_e4m3fn)
    return _signed(record.codes.to(torch.int16), record.spec)


def _signed(codes: Tensor, spec: QuantSpec) -> Tensor:
    """int8 numbers of unsigned codes or zero points: the grid begins at −2^(bits−1)."""
    return (codes - spec.middle).to(torch.int8)
