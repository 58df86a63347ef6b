"""What GPTQ and AWQ files have in common: integer weights alone, in blocks, with scales in float16."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq_llm.checkpoint import difference, refuse_new_bias, refuse_ragged
from ptq_llm.unpack import Array, round_to
from ptqcore import ExportError, QuantizedTensor, QuantLinear, QuantSection, QuantSpec

_NUMBERED = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Capacity:
    """Which layers a format holds: grids that its readers load, and sizes that fill its words."""

    export: str
    bits: tuple[int, ...]
    granularities: tuple[str, ...]
    group_sizes: tuple[int, ...]
    inputs_multiple: int
    outputs_multiple: int

    def refuse(self, quant: QuantSection) -> None:
        """Refuse, before anything is computed, a recipe that the format cannot hold.

        Raises:
            ExportError: naming the key, its value and what to set instead.
        """
        if quant.activations is not None:
            raise ExportError(
                f"export {self.export} cannot hold quant.activations {quant.activations.spec}: it stores "
                "weights alone, set quant.activations to null"
            )
        self._refuse_spec(quant.weights.spec)
        if quant.first_last_bits is not None and quant.first_last_bits not in self.bits:
            raise self._wrong("quant.first_last_bits", quant.first_last_bits, self.bits)

    def refuse_float(self, quant: QuantSection, name: str, layer: nn.Linear) -> None:
        """Refuse, before anything is quantized, a layer that the format cannot hold.

        Raises:
            ExportError: naming the layer.
        """
        self._refuse_place(name, layer.in_features, layer.out_features, quant.weights.group_size)
        dtype = str(layer.weight.dtype).removeprefix("torch.")
        if quant.weights.scale_dtype is None and dtype not in ("float16", "bfloat16"):
            raise ExportError(
                f"export {self.export} stores scales in float16, but with quant.weights.scale_dtype null "
                f"those of {name} are {dtype}: set it to float16"
            )

    def refuse_quantized(self, name: str, layer: QuantLinear) -> None:
        """Refuse, before anything is written, a quantized layer that the format cannot hold.

        Raises:
            ExportError: naming the layer.
        """
        self._refuse_spec(layer.weight_spec)
        self._refuse_place(name, layer.in_features, layer.out_features, layer.weight_spec.group_size)
        refuse_new_bias(self.export, name, layer)
        if layer.input_quantizer is not None:
            raise ExportError(
                f"export {self.export} stores weights alone, and the inputs of {name} are quantized: set "
                "quant.activations to null"
            )
        if not torch.equal(half(layer.weight_scale).to(layer.weight_scale.dtype), layer.weight_scale):
            raise ExportError(
                f"export {self.export} stores scales in float16, which changes those of {name}: "
                "set quant.weights.scale_dtype to float16"
            )

    def _refuse_spec(self, spec: QuantSpec) -> None:
        held: dict[str, tuple[int | str, ...]] = {
            "dtype": ("int",),
            "bits": self.bits,
            "granularity": self.granularities,
            "group_size": self.group_sizes,
        }
        for key, values in held.items():
            value = getattr(spec, key)
            if value is not None and value not in values:
                raise self._wrong(f"quant.weights.{key}", value, values)

    def _wrong(self, key: str, value: int | str, held: tuple[int | str, ...]) -> ExportError:
        *others, last = map(str, held)
        choice = f"{', '.join(others)} or {last}" if others else last
        return ExportError(f"export {self.export} cannot hold {key} {value}: set it to {choice}")

    def _refuse_place(self, name: str, inputs: int, outputs: int, group_size: int | None) -> None:
        if not in_a_block(name):
            raise ExportError(
                f"export {self.export}: its readers look for quantized layers in the model's blocks, and "
                f"{name} is in none: add it to quant.ignore"
            )
        refuse_ragged(self.export, name, inputs, group_size)
        sizes = {"inputs": (inputs, self.inputs_multiple), "outputs": (outputs, self.outputs_multiple)}
        for what, (size, multiple) in sizes.items():
            if size % multiple:
                raise ExportError(
                    f"export {self.export} cannot hold {name}: its {size} {what} are not a multiple of "
                    f"{multiple}, add the layer to quant.ignore"
                )


def in_a_block(name: str) -> bool:
    """Whether the layer of that path stands in a numbered block."""
    return _NUMBERED.search(name) is not None


def half(scale: Tensor) -> Tensor:
    """The scale as float16."""
    return scale.to(torch.float16)


def zero_points(record: QuantizedTensor) -> Tensor:
    """Zero points uint8 [out, groups], also those that a symmetric grid has without saying."""
    if record.zero_point is None:
        return torch.full_like(record.scale, record.spec.middle, dtype=torch.uint8)
    return record.zero_point.to(torch.uint8)


def weight_difference(stored: Array, layer: QuantLinear) -> float:
    """Largest difference between a layer's weight and (code − zero point) · scale [out, in] of a file.

    The products are exact in float32 (8 bits times 11); they are rounded to the model's dtype, as the
    model's own are.
    """
    name = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(layer.weight_scale.dtype, "F32")
    # Not `layer.weight`, which the layer would keep: one float layer at a time is enough.
    return difference(round_to(stored, name), layer.quantized_weight.dequantize())


def rounding_notes(layers: dict[str, QuantLinear]) -> tuple[str, ...]:
    """What engines compute otherwise than the model, if they do."""
    dtypes = {layer.weight_scale.dtype for layer in layers.values()} - {torch.float16}
    if not dtypes:
        return ()
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    return (
        "codes, zero points and scales are the model's, and here a weight is (code - zero point) * scale "
        f"in {names}: engines that compute it in float16 round it to 11 binary digits",
    )
