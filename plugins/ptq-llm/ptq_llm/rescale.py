"""A factor and an offset per channel, moved from what makes the channels to what reads them.

x̃ = (x − z) / s flows instead of x; consumers become W̃ = W·s and b̃ = b + W z (Outlier Suppression+,
arXiv 2304.09145, eq. 2–4), so that the function stays.

Where a residual reads the output of a norm too (post-norm models, BERT), the paper lets the norm emit
x̃ and gives the residual x̃·s + z. Here the norm stays and each layer that reads it gets x̃ through an
attachment: the same function at the same cost, one multiply-add a channel, and the residual is never
rounded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ptq_llm.groups import Group
from ptq_llm.probing import in_precision
from ptqcore import Attachment, Block, BlockIO, attach, attachments_of, relative_difference, tensors_in

TOLERANCE = 1e-5


class Affine(Attachment):
    """(x − shift) / scale, channel by channel: what could not be moved into what makes x."""

    name = "llm:affine"

    def __init__(self, channels: int, dtype: str = "float32") -> None:
        super().__init__()
        kind = getattr(torch, dtype)
        self.register_buffer("scale", torch.ones(channels, dtype=kind))
        self.register_buffer("shift", torch.zeros(channels, dtype=kind))

    def settings(self) -> dict[str, Any]:
        scale: Tensor = self.get_buffer("scale")
        return {"channels": len(scale), "dtype": str(scale.dtype).removeprefix("torch.")}

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.get_buffer("shift")) / self.get_buffer("scale")

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor, like: Tensor) -> "Affine":
        """The map with these values [channels], in the dtype and on the device of another tensor."""
        made = cls(len(scale), str(like.dtype).removeprefix("torch."))
        made.scale, made.shift = scale.to(like), shift.to(like)
        return made


@dataclass(frozen=True)
class Rescaling:
    """scale, shift: of every channel [channels], double."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, channels: int) -> "Rescaling":
        """The one that changes nothing."""
        return cls(torch.ones(channels).double(), torch.zeros(channels).double())

    @property
    def shifts(self) -> bool:
        """Whether any channel is shifted."""
        return bool(self.shift.any())

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return not self.shifts and bool((self.scale == 1).all())

    def weight(self, weight: Tensor) -> Tensor:
        """W̃ of W [out, channels], in its dtype."""
        return (weight.double() * self.scale.to(weight.device)).to(weight.dtype)

    def bias(self, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """b̃ [out] for the weight before it was rescaled."""
        if not self.shifts:
            return bias
        moved = weight.double() @ self.shift.to(weight.device)
        return (moved if bias is None else moved + bias.double()).to(weight.dtype)

    def inputs(self, x: Tensor) -> Tensor:
        """x̃ of x [..., channels]."""
        if self.is_identity:
            return x
        return (x - self.shift.to(x)) / self.scale.to(x) if self.shifts else x / self.scale.to(x)


@torch.no_grad()
def rescale(block: Block, group: Group, change: Rescaling) -> None:
    """Change the weights of a group, in place.

    A producer that cannot be changed so (a norm without bias that is to shift, an input that others
    read) gets the affine map as an attachment.
    """
    if change.is_identity:
        return
    model = block.model
    for path in group.consumers:
        layer = model.get_submodule(path)
        _set_bias(layer, change.bias(layer.get_parameter("weight"), layer._parameters.get("bias")))
        set_parameter(layer, "weight", change.weight(layer.get_parameter("weight")))
    for name in group.others:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        set_parameter(module, key, change.weight(module.get_parameter(key)))
    if group.kind == "norm":
        _rescale_norm(model.get_submodule(group.producer), change, group.unit_offset)
    elif group.kind == "linear":
        _rescale_rows(model.get_submodule(group.producer), group, change)
    else:
        for path in group.consumers:
            layer = model.get_submodule(path)
            attach(layer, Affine.of(change.scale, change.shift, layer.get_parameter("weight")))


def _rescale_norm(norm: nn.Module, change: Rescaling, unit_offset: bool) -> None:
    weight, bias = norm.get_parameter("weight"), norm._parameters.get("bias")
    if attachments_of(norm):  # an earlier step's, which the gain is in front of
        attach(norm, Affine.of(change.scale, change.shift, weight), "output")
        return
    gain = weight.double() + 1 if unit_offset else weight.double()
    gain = gain / change.scale.to(weight.device)
    set_parameter(norm, "weight", (gain - 1 if unit_offset else gain).to(weight.dtype))
    if bias is not None:
        set_parameter(norm, "bias", change.inputs(bias.double()).to(bias.dtype))
    elif change.shifts:
        offset = -change.shift / change.scale
        attach(norm, Affine.of(torch.ones_like(offset), -offset, weight), "output")


def _rescale_rows(layer: nn.Module, group: Group, change: Rescaling) -> None:
    """Divide the producer's rows; channels that are the same row have the same factor."""
    assert group.rows is not None
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    factors = torch.ones(len(weight)).double()
    factors[group.rows] = change.scale
    factors = factors.to(weight.device)
    set_parameter(layer, "weight", (weight.double() / factors[:, None]).to(weight.dtype))
    if bias is not None:
        set_parameter(layer, "bias", (bias.double() / factors).to(bias.dtype))


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """A new parameter: what shares memory with the old one keeps its values."""
    module.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=False))


def _set_bias(layer: Any, bias: Tensor | None) -> None:
    if bias is None:
        return
    if layer._parameters.get("bias") is None:
        layer.has_new_bias = True
    set_parameter(layer, "bias", bias)


@torch.no_grad()
def check(block: Block, io: BlockIO, group: Group, shift: bool) -> float:
    """max|y′ − y| / max|y| of the block's output, with random factors in [1/2, 2], and random offsets if
    `shift`, for the first sample that reaches the group's layers.

    Computed in float32, and, where that shows more than `TOLERANCE`, in float64: next to large offsets
    float32 rounds more than that. The block stays as it was.
    """
    change = _random(block, group, shift)
    for dtype in (torch.float32, torch.float64):
        with in_precision(block, dtype):
            error = _difference(block, io, group, change)
        if error <= TOLERANCE:
            break
    return error


def _difference(block: Block, io: BlockIO, group: Group, change: Rescaling) -> float:
    kept = _Kept(block, group)
    number, expected = _reaching(io, group)
    error = 0.0
    try:
        rescale(block, group, change)
        if number in io.share.numbers:
            found = io.run_sample(io.share.numbers.index(number))
            error = relative_difference(tensors_in(expected), tensors_in(found))
    finally:
        kept.restore()
    return io.share.everywhere(error)[number % io.share.ranks]


def _reaching(io: BlockIO, group: Group) -> tuple[int, Any]:
    """The number of the first sample in which tokens flow into the group's layers, else of the last, and
    the block's output of that or of another one."""
    tokens = 0

    def note(_: nn.Module, args: Any) -> None:
        nonlocal tokens
        tokens += args[0].numel()

    layers = [io.block.model.get_submodule(path) for path in group.consumers]
    outputs: dict[int, Any] = {}

    def reached() -> Iterator[bool]:
        for sample, number in enumerate(io.share.numbers):
            outputs.clear()
            outputs[number] = io.run_sample(sample)
            yield tokens > 0

    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        for number, found in enumerate(io.share.in_order(reached())):
            last = number
            if found:
                break
        return last, outputs.get(last)
    finally:
        for handle in handles:
            handle.remove()


def _random(block: Block, group: Group, shift: bool) -> Rescaling:
    generator = torch.Generator().manual_seed(0)
    channels = block.model.get_submodule(group.consumers[0]).get_parameter("weight").shape[1]
    exponents = torch.rand(channels, generator=generator).double() * 2 - 1
    offsets = torch.randn(channels, generator=generator).double()
    if group.rows is not None:
        exponents, offsets = _per_row(exponents, group.rows), _per_row(offsets, group.rows)
    return Rescaling(2**exponents, offsets if shift else torch.zeros_like(offsets))


def _per_row(values: Tensor, rows: Tensor) -> Tensor:
    """One value for all channels of a row."""
    per_row = torch.zeros(int(rows.max()) + 1, dtype=values.dtype)
    per_row[rows] = values
    return per_row[rows]


class _Kept:
    """Parameters and attachments of all modules of a group, to be put back."""

    def __init__(self, block: Block, group: Group) -> None:
        names = {*group.layers, *(name.rpartition(".")[0] for name in group.others)}
        modules = [block.model.get_submodule(name) for name in names]
        self._parameters = [(module, dict(module._parameters)) for module in modules]
        self._attached = [(module, len(attachments_of(module) or ())) for module in modules]
        self._new = [(module, getattr(module, "has_new_bias", False)) for module in modules]

    def restore(self) -> None:
        for module, parameters in self._parameters:
            module._parameters.update(parameters)
        for module, count in self._attached:
            attachments = attachments_of(module)
            if attachments is not None:
                del attachments[count:]
                del attachments.places[count:]
        for module, new in self._new:
            if not new and hasattr(module, "has_new_bias"):
                del module.has_new_bias
