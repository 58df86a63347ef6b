"""The compressed-tensors format: what transformers and vLLM load as a quantized checkpoint."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_llm.compressed_scheme import Scheme, format_of, quantization_config, refuse
from ptq_llm.unpack import Array, Layout, TensorFile, read_weight
from ptqcore import (
    Exporter,
    ExportError,
    QuantizedTensor,
    QuantLinear,
    QuantModule,
    QuantSection,
    Task,
    Verification,
    pack_bits,
    write_tensors,
)

_WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILE = "config.json"
_MIDDLE = 128  # what an unsigned 8-bit code is above the signed number that the format stores
_PIECE = 2**22  # elements compared at a time


class CompressedTensors(Exporter):
    """Integer weights of 2 to 8 bits (packed), int8 weights and inputs, or FP8 e4m3.

    transformers loads every export; asymmetric weights only with
    `quantization_config=CompressedTensorsConfig(dequantize=True)`, which takes one scheme for the
    whole model and ignores the inputs' grids. vLLM runs symmetric weights of any width, asymmetric
    ones of 4 and 8 bits, and inputs with one scale per token or one static scale.
    """

    name = "compressed-tensors"

    def check(self, quant: QuantSection) -> None:
        refuse((quant.weights.spec, None if quant.activations is None else quant.activations.spec))

    def check_layers(self, quant: QuantSection, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            if not isinstance(layer, nn.Linear):
                raise _not_linear(name)
            _refuse_ragged(name, layer.in_features, quant.weights.group_size)

    def export(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> None:
        layers = _quantized_layers(model)
        for name, layer in layers.items():
            _refuse_layer(name, layer)
        task.save_assets(folder)
        tensors = dict(_plain_tensors(model, layers))
        for name, layer in layers.items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in _layer_tensors(layer).items()}
        stored = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        write_tensors(folder / _WEIGHTS_FILE, stored, {"format": "pt"})
        config = _read_config(folder)
        schemes = {name: _scheme(layer) for name, layer in layers.items()}
        config["quantization_config"] = quantization_config(schemes, _float_linears(model))
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / _CONFIG_FILE).write_text(text, encoding="utf-8")

    def verify(self, model: nn.Module, task: Task, samples: Sequence[Any], folder: Path) -> Verification:
        file = TensorFile(folder / _WEIGHTS_FILE)
        layers = _quantized_layers(model)
        layouts = _layouts(model, layers, folder)
        known = {f"{name}.{key}" for name, layout in layouts.items() for key in layout.tensors()}
        largest = 0.0
        for name, layer in layers.items():
            largest = max(largest, _layer_difference(file, name, layer, layouts[name]))
        for name, tensor in _plain_tensors(model, layers):
            known.add(name)
            largest = max(largest, _difference(file.numbers(name, tuple(tensor.shape)), tensor))
        if unknown := sorted(file.names - known):
            raise ExportError(f"tensor {unknown[0]} is in the file but not in the model")
        return Verification(largest)


def _quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Quantized layers by path.

    Raises:
        ExportError: if there is none, one is not linear, or one is tied to the embedding.
    """
    tied = _tied_output(model)
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, QuantModule):
            continue
        if not isinstance(module, QuantLinear):
            raise _not_linear(name)
        if module is tied:
            raise ExportError(
                f"export compressed-tensors cannot hold a quantized {name} that is tied to the "
                f"embedding, add {name} to quant.ignore"
            )
        layers[name] = module
    if not layers:
        raise ExportError("export compressed-tensors: the model has no quantized layer")
    return layers


def _float_linears(model: nn.Module) -> list[str]:
    """Paths of the linear layers left in full precision."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _tied_output(model: nn.Module) -> nn.Module | None:
    """The output layer, if the model's configuration ties it to the embedding."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    output: nn.Module | None = model.get_output_embeddings() if tied else None  # type: ignore[operator]
    return output


def _scheme(layer: QuantLinear) -> Scheme:
    return layer.weight_spec, None if layer.input_quantizer is None else layer.input_quantizer.spec


def _refuse_layer(name: str, layer: QuantLinear) -> None:
    """Refuse a layer that cannot be stored.

    Raises:
        ExportError: naming the layer.
    """
    refuse(_scheme(layer))
    if layer.has_new_bias:
        raise ExportError(
            f"export compressed-tensors: a step gave {name} a bias, which readers of this architecture "
            "would leave out: remove bias-correction, or the export"
        )
    _refuse_ragged(name, layer.in_features, layer.weight_spec.group_size)
    inputs = layer.input_quantizer
    if inputs is not None and inputs.scale is not None and not torch.isfinite(inputs.scale).all():
        raise ExportError(f"export compressed-tensors: the input of {name} has no calibrated range")


def _not_linear(name: str) -> ExportError:
    return ExportError(f"export compressed-tensors holds linear layers only, and {name} is not one")


def _refuse_ragged(name: str, columns: int, size: int | None) -> None:
    if size is not None and columns % size:
        raise ExportError(
            f"export compressed-tensors cannot hold {name}: its {columns} inputs are not a multiple of "
            f"quant.weights.group_size {size}, set another size or add the layer to quant.ignore"
        )


def _plain_tensors(model: nn.Module, layers: dict[str, QuantLinear]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are stored under their own name: everything but quantized weights and grids.

    A tied output layer is left out, for readers make it from the embedding. Any other tensor that
    shares memory is copied: a safetensors file refuses memory that is shared.
    """
    grids = {
        f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if key != "bias"
    }
    output = _tied_output(model)
    tied = None if output is None else output.get_parameter("weight").data_ptr()
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        address = tensor.data_ptr()
        if name in grids or (address in seen and address == tied):
            continue
        yield name, tensor.clone() if address in seen else tensor
        seen.add(address)


def _layer_tensors(layer: QuantLinear) -> dict[str, Tensor]:
    """What a quantized layer [out, in] stores, by the names after its path, without its bias."""
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    return config


def _layouts(model: nn.Module, layers: dict[str, QuantLinear], folder: Path) -> dict[str, Layout]:
    """How config.json says that each quantized layer is stored.

    Raises:
        ExportError: if it does not say so for a quantized layer, or does for one that is not.
    """
    config = _read_config(folder).get("quantization_config")
    if config is None:
        raise ExportError(f"{folder / _CONFIG_FILE} has no key 'quantization_config'")
    for name in _float_linears(model):
        if Layout.find(config, name) is not None:
            raise ExportError(f"config.json says that layer {name} is quantized, but it is not")
    layouts = {}
    for name in layers:
        layout = Layout.find(config, name)
        if layout is None:
            raise ExportError(f"config.json does not say how layer {name} is quantized")
        layouts[name] = layout
    return layouts


def _layer_difference(file: TensorFile, name: str, layer: QuantLinear, layout: Layout) -> float:
    """Largest difference of a layer's weight, and of its input's grid if that is static."""
    weight = read_weight(file, name, layout, (layer.out_features, layer.in_features))
    # Not `layer.weight`, which the layer would keep: one float layer at a time is enough.
    largest = _difference(weight, layer.quantized_weight.dequantize())
    inputs = layer.input_quantizer
    if inputs is not None and inputs.scale is not None:
        largest = max(largest, _difference(file.numbers(f"{name}.input_scale", (1,)), inputs.scale))
        if inputs.zero_point is not None:
            signed = file.numbers(f"{name}.input_zero_point", (1,))
            largest = max(largest, _difference(signed.astype(np.float32) + _MIDDLE, inputs.zero_point))
    return largest


def _difference(stored: Array, tensor: Tensor) -> float:
    """Largest absolute difference; infinite where only one of the two is NaN."""
    ours = tensor.detach().cpu()
    if ours.is_floating_point() and ours.dtype != torch.float64:
        ours = ours.float()
    left, right = stored.reshape(-1), ours.numpy().reshape(-1)
    largest = 0.0
    for start in range(0, left.size, _PIECE):
        a = left[start : start + _PIECE].astype(np.float64)
        b = right[start : start + _PIECE].astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        apart = np.abs(np.where(same, 0, a) - np.where(same, 0, b))
        largest = max(largest, float(np.nan_to_num(apart, nan=np.inf).max()))
    return largest
