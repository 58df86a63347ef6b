"""What a denoiser is called with: a noisy sample, the time, and the conditions."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_map_with_path

from ptqcore import DataError, ModelError, tensors_in

TIMES = ("timestep", "timesteps", "t")
"""Names that the time has among the parameters of denoisers."""
_GUIDANCE = ("guidance", "guidance_scale", "timestep_cond")
_POSITIONS = {"coords", "ids", "mask", "masks", "rope", "rotary"}
_NOT_POSITIONS = ("class_ids", "crop_coords", "input_ids", "time_ids")


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """One call of a denoiser: `values` are what its `forward` gets, by parameter name, in the order given.

    timestep: the parameter that holds the time: a number, or a tensor: one time for all rows, [rows], or
    [rows, tokens].
    sample: the first other parameter that holds tensors.

    All other tensors, in nested tuples, lists and dicts too, are conditions, except what a run holds fixed:
    masks, positions (`img_ids`, `image_rotary_emb`) and the guidance that a network is told.
    """

    values: Mapping[str, Any]
    timestep: str
    sample: str

    @classmethod
    def of(cls, model: nn.Module, *args: Any, **kwargs: Any) -> "DenoiserCall":
        """The call `model(*args, **kwargs)`.

        Raises:
            ModelError: if the model's `forward` has no parameter that is the time, if it was not given, or
                if no other tensor was.
        """
        name = type(model).__name__
        values, order = _by_name(model, args, kwargs)
        timestep = next((time for time in TIMES if time in order), None)
        if timestep is None:
            raise ModelError(
                f"{name}.forward has no parameter 'timestep', 'timesteps' or 't', only {', '.join(order)}: "
                "a network that is not told the time has no temporal block"
            )
        if not isinstance(values.get(timestep), int | float | Tensor):
            raise ModelError(
                f"{name} was called without a number or a tensor as {timestep!r}: pass the time of each row"
            )
        holding = (key for key in order if key != timestep and tensors_in(values.get(key)))
        sample = next(holding, None)
        if sample is None:
            raise ModelError(f"{name} was called without a tensor beside the time: pass a noisy sample")
        return cls(values, timestep, sample)

    def run(self, model: nn.Module) -> Any:
        """What the model returns."""
        return model(**self.values)

    @property
    def rows(self) -> int:
        """How many samples are denoised together."""
        return len(self.values[self.sample])

    @property
    def times(self) -> Tensor:
        """The time as a tensor, of whatever shape it was given in."""
        return torch.as_tensor(self.values[self.timestep])

    @property
    def has_time_of_rows(self) -> bool:
        """Whether samples are the rows of one tensor, and each is given a time of its own."""
        one_tensor = isinstance(self.values[self.sample], Tensor)
        return one_tensor and self.times.ndim > 0 and self.times.shape[0] == self.rows

    @property
    def conditions(self) -> dict[str, Tensor]:
        """Name → tensor, for all tensors that say what to draw; names of nested ones have dots."""
        others = {key: self.values[key] for key in self.values if key not in (self.timestep, self.sample)}
        leaves = {_name(path): leaf for path, leaf in tree_flatten_with_path(others)[0]}
        return {name: leaf for name, leaf in leaves.items() if _is_condition(name, leaf)}

    def with_timestep(self, value: float | Tensor) -> "DenoiserCall":
        """The call at another time: one for all rows, or a tensor [rows] with one for each.

        A single time gets the shape that the time now has. Whole numbers keep its dtype.

        Raises:
            DataError: if a tensor does not hold one time for each row.
        """
        old = self.values[self.timestep]
        if not isinstance(old, Tensor) and not (isinstance(value, Tensor) and value.ndim):
            return self._with({self.timestep: value.item() if isinstance(value, Tensor) else value})
        new = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        shape = self._shape(new)
        new = new.reshape(new.shape + (1,) * (len(shape) - new.ndim)) if new.ndim else new
        own = self.times
        keeps = own.is_floating_point() or bool((new == new.round()).all())
        dtype = own.dtype if keeps else torch.float32
        device = (old if isinstance(old, Tensor) else tensors_in(self.values[self.sample])[0]).device
        return self._with({self.timestep: new.expand(shape).to(device, dtype, copy=True)})

    def with_tensor_time(self) -> "DenoiserCall":
        """The call with the time as a tensor, if it was a number."""
        return self._with({self.timestep: self.times})

    def with_sample(self, generator: torch.Generator) -> "DenoiserCall":
        """The call with another random sample of the same size."""
        return self._mapped(lambda _, leaf: _redrawn(leaf, generator), self.sample)

    def with_condition(self, generator: torch.Generator) -> "DenoiserCall":
        """The call with other random conditions: of the same size; class labels stay below the largest."""
        conditions = self.conditions
        return self._mapped(
            lambda name, leaf: _redrawn(leaf, generator) if name in conditions else leaf, *self.values
        )

    def with_rows(self, rows: int) -> "DenoiserCall":
        """The call with the first row repeated: of all tensors that have one row per sample.

        Raises:
            DataError: if samples are not the rows of one tensor.
        """
        own = self.rows
        if not isinstance(self.values[self.sample], Tensor):
            raise DataError(f"the samples {self.sample!r} are a list, which has no rows to repeat")

        def repeated(name: str, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.shape[:1] != (own,):
                return leaf
            return leaf[:1].repeat(rows, *(1 for _ in leaf.shape[1:]))

        return self._mapped(repeated, *self.values)

    def copied(self) -> "DenoiserCall":
        """The call with copies of all tensors, into which a denoiser may write."""
        return self._mapped(
            lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, *self.values
        )

    def as_float32(self) -> "DenoiserCall":
        """The call with tensors of lower precision in single precision."""
        return self._mapped(lambda _, leaf: at_least_float32(leaf), *self.values)

    def _shape(self, times: Tensor) -> torch.Size:
        """The shape in which the denoiser is given some times: one, [rows], or what it now is."""
        own = self.times.shape
        if not times.ndim or times.shape == own:
            return own
        if times.shape != (self.rows,):
            shape = list(times.shape)
            raise DataError(f"got timesteps of shape {shape} for {self.rows} rows: pass one for each row")
        return torch.Size((self.rows, *own[1:]))

    def _with(self, changed: Mapping[str, Any]) -> "DenoiserCall":
        return replace(self, values={**self.values, **changed})

    def _mapped(self, function: Callable[[str, Any], Any], *names: str) -> "DenoiserCall":
        """The call with some parameters' leaves changed, by their names."""
        chosen = {name: self.values[name] for name in names}
        return self._with(tree_map_with_path(lambda path, leaf: function(_name(path), leaf), chosen))


def other_times(times: Tensor, turn: int, turns: int = 3) -> Tensor:
    """Other times, none above the largest of them (or 1): in each turn others, none the given ones."""
    top = float(times.max())
    if times.is_floating_point():
        top = top if top > 0 else 1.0
        return (times + top * (turn + 1) / (turns + 1)) % top
    steps = max(int(top), turns) + 1
    return (times + (turn + 1) * (steps // (turns + 1))) % steps


def at_least_float32(value: Any) -> Any:
    """A tensor of lower than single precision in single precision; anything else as it is."""
    low = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() < 4
    return value.float() if low else value


def _by_name(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The arguments by name, and the names of all that may be given, in the order of the signature."""
    parameters = inspect.signature(model.forward).parameters
    places = [
        name for name, one in parameters.items() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    if len(args) > len(places):
        raise ModelError(
            f"{type(model).__name__}.forward takes {len(args)} values whose names are not known: "
            "call it with keywords"
        )
    values = {**dict(zip(places, args, strict=False)), **kwargs}
    return values, list(dict.fromkeys([*places, *values]))


def _name(path: Sequence[Any]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _is_condition(name: str, leaf: Any) -> bool:
    if not isinstance(leaf, Tensor) or leaf.dtype is torch.bool:
        return False
    words = [word for word in name.split(".") if not word.isdigit()]
    named = words[-1]
    if named.endswith(_NOT_POSITIONS):
        return True
    return named not in _GUIDANCE and _POSITIONS.isdisjoint(named.split("_"))


def _redrawn(leaf: Any, generator: torch.Generator) -> Any:
    """Other values as large as those of a tensor; whole numbers are turned, each to a different one."""
    if not isinstance(leaf, Tensor) or leaf.dtype is torch.bool or not leaf.numel():
        return leaf
    if leaf.is_floating_point() or leaf.is_complex():
        drawn = torch.randn(leaf.shape, generator=generator).to(leaf)
        size = leaf.detach().abs().square().mean().sqrt()
        return drawn * size if size > 0 else drawn
    top = max(int(leaf.max()), 1)
    turn = int(torch.randint(1, top + 1, (), generator=generator))
    return (leaf + turn) % (top + 1)
