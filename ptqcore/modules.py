"""Quantized layers: a packed weight, and optionally a quantized input."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.overrides import handle_torch_function, has_torch_function_unary

from ptqcore import grid
from ptqcore.on_disk import OnDisk, storage_of
from ptqcore.packed import QuantizedTensor
from ptqcore.quantizers import FakeQuant
from ptqcore.spec import QuantSpec

LAYERS_WITH_ROWS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def weight_rows(layer: nn.Module) -> Tensor:
    """The weight of a linear or (transposed) convolution layer, output channels first [out, …].

    PyTorch keeps the weight of a transposed convolution as [in, out/groups, …].
    """
    weight = layer.get_parameter("weight")
    if not isinstance(layer, _ConvTransposeNd):
        return weight
    return weight.view(layer.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def rows_to_weight(rows: Tensor, layer: Any) -> Tensor:
    """Inverse of `weight_rows`, for a float layer or the module that quantizes it."""
    if not isinstance(layer, _ConvTransposeNd | QuantConvTranspose2d):
        return rows
    return rows.view(layer.groups, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 1)


class QuantModule(nn.Module, ABC):
    """A layer whose weight is held as packed integers and whose input may be rounded to a grid.

    Buffers: `weight_codes` (int32 words), `weight_scale` and, if asymmetric, `weight_zero_point`
    (uint8). The forward pass computes with the dequantized weight, which is made at the first use
    and kept beside the packed one, unless that lies on disk. It starts empty: fill it with `set_weight`
    or a state dict.

    Where `input_scale` [1] is known, the input is on the static grid of that scale, and products are
    summed in whole numbers; where `output_scale` [1] is known too, the output is rounded to whole
    steps of it. `computes_in_codes` switches both off.
    """

    quantizes: ClassVar[type[nn.Module]]
    function: ClassVar[str]
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    input_scale: Tensor | None
    output_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> None:
        """Take shape, dtype, bias and hyper-parameters from a float layer."""
        super().__init__()
        weight = weight_rows(layer)
        rows, columns = weight.shape[0], math.prod(weight.shape[1:])
        layout = grid.layout_shape((rows, columns), weight_spec)
        words = -(-columns * weight_spec.bits // 32)
        device = weight.device
        self.weight_spec = weight_spec
        self.weight_shape = tuple(weight.shape)
        self.register_buffer("weight_codes", torch.zeros(rows, words, dtype=torch.int32, device=device))
        self.register_buffer("weight_scale", torch.ones(layout, dtype=weight.dtype, device=device))
        zero_point = (
            None if weight_spec.symmetric else torch.zeros(layout, dtype=torch.uint8, device=device)
        )
        self.register_buffer("weight_zero_point", zero_point)
        bias: nn.Parameter | None = getattr(layer, "bias", None)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        )
        self.input_quantizer = None if input_spec is None else FakeQuant(input_spec)
        self.register_buffer("input_scale", None)
        self.register_buffer("output_scale", None)
        self.computes_in_codes = True
        self.has_new_bias: bool = getattr(layer, "has_new_bias", False)
        self._dequantized: Tensor | None = None
        self._whole: Tensor | None = None

    def set_weight(self, weight: QuantizedTensor) -> None:
        """Hold this quantized weight.

        Raises:
            ValueError: if its spec, shape or dtype is not the layer's.
        """
        given = (weight.spec, weight.shape, weight.scale.dtype)
        own = (self.weight_spec, self.weight_shape, self.weight_scale.dtype)
        if given != own:
            raise ValueError(f"a weight {given} does not fit a layer {own}")
        for name, value in weight.pack().items():
            setattr(self, f"weight_{name}", value)
        self.release()

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The canonical record, unpacked."""
        packed = {"codes": self.weight_codes, "scale": self.weight_scale}
        if self.weight_zero_point is not None:
            packed["zero_point"] = self.weight_zero_point
        return QuantizedTensor.unpack(packed, self.weight_spec, self.weight_shape)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, in the dtype and shape of the float layer's."""
        if self._dequantized is not None:
            return self._dequantized
        with torch.inference_mode(False):  # the cache may serve a backward pass later
            weight = rows_to_weight(self.quantized_weight.dequantize(), self)
        if not isinstance(self.weight_codes, OnDisk):
            self._dequantized = weight
        return weight

    def release(self) -> None:
        """Keep the packed weight alone, until the next use."""
        self._dequantized = self._whole = None

    def ensure_bias(self) -> nn.Parameter:
        """The bias; a layer that had none gets one of zeros."""
        if self.bias is None:
            self.has_new_bias = True
            zeros = self.weight_scale.new_zeros(self.weight_shape[0])
            self.bias = nn.Parameter(zeros, requires_grad=False)
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        if self.input_scale is None or not self.computes_in_codes:
            return self.compute(x, self.weight, self.bias)
        return _IN_CODES[self.function](x, self)

    @abstractmethod
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float layer's function of an input that is already on its grid."""

    def compute_in_codes(self, x: Tensor) -> Tensor:
        """The same with sums of whole numbers, as integer engines compute it.

        Sums below 2^24 are exact in float32, in whatever order they are taken: so neither threads nor
        the size of a batch change a result. Engines multiply a sum by one number, input scale times
        weight scale over output scale, and round: done in the same order, ties fall as theirs do.
        """
        assert self.input_scale is not None
        sums = self.compute(torch.round(x / self.input_scale), self._whole_numbers(), None)
        step = (self.input_scale * self.weight_scale.flatten()).expand(self.weight_shape[0])
        shape = (-1,) if isinstance(self, QuantLinear) else (-1, 1, 1)
        if self.bias is not None:
            codes = torch.round(self.bias.double() / step.double())
            sums = (sums + codes.view(shape)).float()  # in double: large biases stay whole
        if self.output_scale is None:
            return sums * step.view(shape)
        return (sums * (step / self.output_scale).view(shape)).round_() * self.output_scale

    def _whole_numbers(self) -> Tensor:
        """The weight in units of its scale."""
        if self._whole is not None:
            return self._whole
        with torch.inference_mode(False):
            record = self.quantized_weight
            middle = record.spec.middle if record.zero_point is None else record.zero_point
            codes = (record.codes.to(record.scale.dtype) - middle).view(record.shape)
            whole = rows_to_weight(codes, self)
        if not isinstance(self.weight_codes, OnDisk):
            self._whole = whole
        return whole

    def extra_repr(self) -> str:
        return f"{self.weight_shape}, weight {self.weight_spec}"

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantModule":
        self.release()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)


class QuantLinear(QuantModule):
    """`torch.nn.Linear` with a quantized weight [out, in]."""

    quantizes = nn.Linear
    function = "linear"

    def __init__(self, layer: nn.Linear, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> None:
        super().__init__(layer, weight_spec, input_spec)
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class QuantConv2d(QuantModule):
    """`torch.nn.Conv2d` with a quantized weight [out, in/groups, height, width]."""

    quantizes = nn.Conv2d
    function = "conv2d"

    def __init__(self, layer: nn.Conv2d, weight_spec: QuantSpec, input_spec: QuantSpec | None) -> None:
        super().__init__(layer, weight_spec, input_spec)
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding, self.padding_mode = layer.padding, layer.padding_mode
        self._padding = layer._reversed_padding_repeated_twice

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._padding, mode=self.padding_mode), 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)


class QuantConvTranspose2d(QuantModule):
    """`torch.nn.ConvTranspose2d`; the record's weight is [out, in/groups, height, width]."""

    quantizes = nn.ConvTranspose2d
    function = "conv_transpose2d"

    def __init__(
        self, layer: nn.ConvTranspose2d, weight_spec: QuantSpec, input_spec: QuantSpec | None
    ) -> None:
        super().__init__(layer, weight_spec, input_spec)
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding, self.output_padding = layer.padding, layer.output_padding

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sizes: Any = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return F.conv_transpose2d(x, weight, bias, *sizes)


def _in_codes(name: str) -> Callable[[Tensor, "QuantModule"], Tensor]:
    """A torch function of the layer's own name, so that its edges are found where the layer's are."""

    def function(x: Tensor, layer: QuantModule) -> Tensor:
        if has_torch_function_unary(x):
            result: Tensor = handle_torch_function(function, (x,), x, layer)
            return result
        return layer.compute_in_codes(x)

    function.__name__ = name
    return function


_IN_CODES = {name: _in_codes(name) for name in ("linear", "conv2d", "conv_transpose2d")}

QUANTIZED_BY: dict[type[nn.Module], type[QuantModule]] = {
    kind.quantizes: kind for kind in (QuantLinear, QuantConv2d, QuantConvTranspose2d)
}


def quantized_class(layer: nn.Module) -> type[QuantModule] | None:
    """The class that quantizes this layer, or None.

    The type must match exactly: a subclass may use its weight in ways that we do not know.
    """
    return QUANTIZED_BY.get(type(layer))


def quantizable_layers(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Float layers inside `module` that can be quantized, by path (the module itself included)."""
    found = {}
    for name, child in module.named_modules(prefix=prefix):
        if quantized_class(child) is not None:
            found[name] = child
    return found


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put `new` in the place of a module, at every path where that same module stands."""
    old = model.get_submodule(path)
    holders = list(model.modules())
    for holder in holders:
        for name, child in list(holder._modules.items()):
            if child is old:
                setattr(holder, name, new)
    _keep_from_fast_paths(holders, new)


def _keep_from_fast_paths(modules: Sequence[nn.Module], layer: nn.Module) -> None:
    """PyTorch's transformer encoders hand the weights of their layers to one kernel, which would pass over
    what a layer does to its input: let those that hold this layer call it."""
    for module in modules:
        encoder = isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer)
        if not encoder or all(child is not layer for child in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        else:
            module.activation_relu_or_gelu = 0  # type: ignore[assignment]


def state_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers of a model; shared tensors count once."""
    unique = {(storage_of(tensor), tensor.nbytes) for tensor in module.state_dict().values()}
    return sum(size for _, size in unique)
