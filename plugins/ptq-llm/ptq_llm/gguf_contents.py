"""What a GGUF file holds of a quantized model: every tensor under its name, as blocks or as it is."""

import torch
from torch import Tensor, nn

from ptq_llm import gguf_blocks as blocks
from ptq_llm.gguf_model import Layout
from ptqcore import ExportError, QuantizedTensor, QuantLinear, QuantModule, QuantSpec

HELD = "its blocks hold 4 bits, or 8 symmetric ones"

Source = Tensor | QuantLinear  # what is stored as it is, or as blocks


def contents(model: nn.Module, layout: Layout) -> dict[str, Source]:
    """Everything that is stored, by its name in the file.

    An output layer that is tied to the embedding is left out: readers use the embedding.

    Raises:
        ExportError: naming what the format cannot hold.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QuantModule)}
    if not layers:
        raise ExportError("export gguf: the model has no quantized layer")
    sources: dict[str, Source] = {}
    for path, layer in layers.items():
        if not isinstance(layer, QuantLinear):
            raise not_linear(path)
        _refuse_layer(path, layer)
        sources[layout.name(f"{path}.weight")] = layer
    grids = {f"{path}.{key}" for path, layer in layers.items() for key in {*layer.state_dict()} - {"bias"}}
    for path, tensor in model.state_dict().items():
        if path not in grids and not layout.is_tied_output(path):
            sources[layout.name(path)] = tensor
    factors = layout.rope_factors()
    return sources if factors is None else sources | {"rope_freqs.weight": factors}


def shape(source: Source) -> tuple[int, ...]:
    """Shape of a tensor in the model."""
    return source.weight_shape if isinstance(source, QuantLinear) else tuple(source.shape)


def kind(source: Source) -> blocks.BlockType:
    """The type under which it is stored."""
    if isinstance(source, Tensor):
        return blocks.float_type(source)
    found = blocks.block_type(source.weight_spec)
    assert found is not None  # `contents` refuses such layers
    return found


def row_bytes(source: Source) -> blocks.Bytes:
    """Its bytes [rows, bytes per row], rows in the model's order."""
    if isinstance(source, Tensor):
        return blocks.float_bytes(source)
    return blocks.pack_blocks(source.quantized_weight)


def values(source: Source) -> Tensor:
    """The numbers that a reader must find, float32, rows in the model's order.

    They are exact: a code less its zero point has 8 bits at most, a scale 11.
    """
    if isinstance(source, Tensor):
        return source.detach().cpu().float()
    record = source.quantized_weight
    zero_point = None if record.zero_point is None else record.zero_point.float()
    exact = QuantizedTensor(record.codes, record.scale.float(), zero_point, record.spec, record.shape)
    weight = exact.dequantize().cpu()
    if zero_point is not None:
        shift = torch.from_numpy(blocks.rounding_of_minima(record)).float()
        weight += shift.repeat_interleave(blocks.BLOCK, dim=1)
    return weight


def cannot(sentence: str) -> ExportError:
    """The error that says what the format cannot hold."""
    return ExportError(f"export gguf cannot hold {sentence}")


def not_linear(name: str) -> ExportError:
    """The error that names a quantized layer of another kind."""
    return ExportError(f"export gguf holds quantized linear layers only, and {name} is not one")


def refuse_grid(spec: QuantSpec, layer: str = "") -> None:
    """Refuse a grid that no block holds.

    Raises:
        ExportError: naming the key, and the layer where one is given.
    """
    where = f"{layer}: " if layer else ""
    if spec.is_float:
        raise cannot(f"{where}quant.weights.dtype {spec.dtype}: its blocks hold integers, set it to int")
    if spec.bits not in (4, 8):
        raise cannot(f"{where}quant.weights.bits {spec.bits}: {HELD}, set it to 4 or 8")
    if blocks.block_type(spec) is None:
        raise cannot(f"{where}quant.weights.symmetric false with bits {spec.bits}: {HELD}, set it to true")
    if spec.group_size is not None and spec.group_size % blocks.BLOCK:
        raise cannot(
            f"{where}quant.weights.group_size {spec.group_size}: every block of 32 has one scale, set it "
            "to a multiple of 32"
        )


def refuse_ragged(name: str, columns: int, size: int | None) -> None:
    """Refuse a layer whose groups and blocks do not fill its rows.

    Raises:
        ExportError: naming the layer.
    """
    if columns % (size or blocks.BLOCK):
        raise cannot(
            f"{name}: its {columns} inputs are not a multiple of "
            f"{f'quant.weights.group_size {size}' if size else '32'}, add the layer to quant.ignore"
        )


def _refuse_layer(name: str, layer: QuantLinear) -> None:
    if layer.input_quantizer is not None:
        raise cannot(f"{name}: its input is quantized, remove quant.activations")
    refuse_grid(layer.weight_spec, name)
    refuse_ragged(name, layer.in_features, layer.weight_spec.group_size)
    lost = blocks.inexact(layer.weight_scale.detach().cpu().double().numpy())
    if lost.size:
        raise cannot(
            f"{name}: float16 cannot hold its scale {lost[0]:.9g}, set quant.weights.scale_dtype to float16"
        )
