"""Which parts of a denoiser's call belong to which image.

Pipelines that guide by classifier-free guidance stack two halves: [unconditional of n images,
conditional of n images]. Some values are the same for all images: position tables, scale factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptq_diffusion.calls import DenoiserCall
from ptqcore import ModelError

_MOST_HALVES = 4


@dataclass(frozen=True)
class Rows:
    """Of a tensor or a list: so many rows of an image in each half, [halves, images, rows of an image]."""

    halves: int
    of_image: int

    def take(self, value: Any, image: int, images: int) -> Any:
        """The rows of one of so many images, copied."""
        places = [
            (half * images + image) * self.of_image + row
            for half in range(self.halves)
            for row in range(self.of_image)
        ]
        if isinstance(value, Tensor):
            return value.detach()[torch.tensor(places, device=value.device)]
        return type(value)(_copied(value[place]) for place in places)

    def join(self, values: Sequence[Any]) -> Any:
        """The rows of several images, of each what `take` gives."""
        if isinstance(values[0], Tensor):
            parts = torch.stack([value.unflatten(0, (self.halves, self.of_image)) for value in values], 1)
            return parts.flatten(0, 2)
        return type(values[0])(
            value[half * self.of_image + row]
            for half in range(self.halves)
            for value in values
            for row in range(self.of_image)
        )


Layout = Rows | dict[str, Any] | list[Any] | None
"""Of a value: its rows, the layouts of its parts, or None if it is the same for all images."""


@dataclass(frozen=True)
class CallLayout:
    """Which parts of a call belong to which image; `rows` of the sample belong to each."""

    values: dict[str, Layout]
    rows: int

    @classmethod
    def of(cls, one: DenoiserCall, two: DenoiserCall) -> "CallLayout":
        """That of the call for one image, and for two alike.

        Raises:
            ModelError: if they differ in more than rows.
        """
        if list(one.values) != list(two.values):
            raise ModelError("the denoiser is called in another way for two images than for one")
        if one.rows > _MOST_HALVES:
            raise ModelError(
                f"the denoiser is given {one.rows} rows for one image: such calls cannot be recorded"
            )
        found = {
            name: _layout_of(one.values[name], two.values[name], one.rows, name) for name in one.values
        }
        return cls(found, one.rows)

    def take(self, call: DenoiserCall, chosen: Sequence[int], images: int) -> list[dict[str, Any]]:
        """The values of some of so many images, copied.

        Raises:
            ModelError: if the call has another number of rows.
        """
        if call.rows != self.rows * images:
            raise ModelError(
                f"the denoiser is given {call.rows} rows for {images} images in some steps, but "
                f"{self.rows * images} in the first"
            )
        return _take(dict(call.values), self.values, chosen, images)

    def shapes(self, values: dict[str, Any]) -> Any:
        """What must be equal for values of several images to be joined."""
        return _shapes(values, self.values)

    def join(self, values: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The values of a call for several images, of each what `take` gives; what is the same for all,
        of the first."""
        return _join(values, self.values)


def _layout_of(one: Any, two: Any, halves: int, name: str) -> Layout:
    if isinstance(one, Mapping) and isinstance(two, Mapping) and list(one) == list(two):
        return {key: _layout_of(one[key], two[key], halves, f"{name}.{key}") for key in one}
    both = (one, two)
    tensors = all(isinstance(each, Tensor) and each.ndim for each in both)
    if not tensors and not all(isinstance(each, list | tuple) for each in both):
        return None
    if len(two) == 2 * len(one):
        per_half, rest = divmod(len(one), halves)
        return Rows(1, len(one)) if rest else Rows(halves, per_half)
    if len(two) != len(one):
        raise ModelError(
            f"the denoiser is given {len(one)} parts as {name!r} for one image, but {len(two)} for two: "
            "such calls cannot be recorded"
        )
    if tensors:
        return None
    return [
        _layout_of(*pair, halves, f"{name}.{place}") for place, pair in enumerate(zip(*both, strict=True))
    ]


def _take(value: Any, layout: Layout, chosen: Sequence[int], images: int) -> list[Any]:
    """Of each chosen image what belongs to it."""
    if isinstance(layout, Rows):
        return [layout.take(value, image, images) for image in chosen]
    if isinstance(layout, dict):
        named = {key: _take(value[key], part, chosen, images) for key, part in layout.items()}
        return [{key: parts[place] for key, parts in named.items()} for place in range(len(chosen))]
    if isinstance(layout, list):
        listed = [_take(each, part, chosen, images) for each, part in zip(value, layout, strict=True)]
        return [type(value)(parts[place] for parts in listed) for place in range(len(chosen))]
    return [_copied(value)] * len(chosen)


def _join(values: Sequence[Any], layout: Layout) -> Any:
    if isinstance(layout, Rows):
        return layout.join(values)
    if isinstance(layout, dict):
        return {key: _join([value[key] for value in values], part) for key, part in layout.items()}
    if isinstance(layout, list):
        parts = [_join([value[place] for value in values], part) for place, part in enumerate(layout)]
        return type(values[0])(parts)
    return values[0]


def _shapes(value: Any, layout: Layout) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(layout, dict):
        return tuple(_shapes(value[key], part) for key, part in layout.items())
    if isinstance(layout, list):
        return tuple(_shapes(each, part) for each, part in zip(value, layout, strict=True))
    return None


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
