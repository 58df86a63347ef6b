"""The timestep that a forward pass computes, for models that have activation ranges for each.

A denoiser is called with one timestep after the other, and its activations change with it. `Timesteps`
holds those that a model was calibrated for; at every call of the model it looks up, once, which rows of
per-timestep tables are to be used, and quantizers everywhere in the model read that with `current`.
Timesteps are known by their value, never by a counter: schedulers repeat, shift and split them.
"""

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ptqcore.errors import ModelError

CHILD = "timesteps"
_RELATIVE, _ABSOLUTE = 1e-5, 1e-6  # float32 timesteps that differ by less are the same

Unseen = Literal["nearest", "interpolate", "refuse"]


@dataclass(frozen=True)
class Moment:
    """Where in per-timestep tables a forward pass is: `lower` and `upper` are rows, each one for the
    whole batch [] or one for each of its rows [batch]; `share` is how far on from the lower to the
    upper row, None if nowhere in between; `seen` which of them are timesteps of the tables, None if all."""

    lower: Tensor
    upper: Tensor
    share: Tensor | None = None
    seen: Tensor | None = None

    def of(self, table: Tensor) -> Tensor:
        """The entry of a table [timesteps, …]: […] or [batch, …]."""
        lower = table[self.lower]
        if self.share is None:
            return lower
        share = self.share.reshape(self.share.shape + (1,) * (table.ndim - 1))
        return lower.lerp(table[self.upper], share.to(lower.dtype))

    @classmethod
    def join(cls, moments: Sequence["Moment"], rows: Sequence[int]) -> "Moment":
        """That of several batches in one, each of one row or of so many rows."""
        lower = torch.cat([moment.lower.expand(size) for moment, size in zip(moments, rows, strict=True)])
        return cls(lower, lower)


_current: ContextVar[Moment | None] = ContextVar("moment", default=None)


def current() -> Moment:
    """The moment of the forward pass that is being computed.

    Raises:
        ModelError: if no timestep is known: a part of the model was called on its own.
    """
    moment = _current.get()
    if moment is None:
        raise ModelError(
            "activations with a range for each timestep were computed outside of their model: call the "
            "whole model, which is given the timestep"
        )
    return moment


@contextmanager
def at(moment: Moment | None) -> Iterator[None]:
    """Compute what is inside at this moment; with None, at that which is current already."""
    if moment is None:
        yield
        return
    token = _current.set(moment)
    try:
        yield
    finally:
        _current.reset(token)


def along(parameter: Tensor, x: Tensor) -> Tensor:
    """Entries of a table, one for all of x or one for each row of its batch [batch], shaped to multiply x.

    Where x has more rows than there are entries (heads folded into the batch), each entry is that of
    as many rows in a row. What has no rows of the batch (a table of positions) has one entry.

    Raises:
        ModelError: if x has no rows of the batch, and the entries differ.
    """
    if not parameter.ndim:
        return parameter
    if x.shape[0] % parameter.shape[0]:
        if bool((parameter != parameter[0]).any()):
            raise ModelError(
                f"an activation with a range for each timestep has {x.shape[0]} rows, no multiple of the "
                f"{parameter.shape[0]} timesteps of the batch: call the model with one timestep at a time"
            )
        return parameter[0]
    rows = parameter.repeat_interleave(x.shape[0] // parameter.shape[0])
    return rows.view(-1, *[1] * (x.ndim - 1))


class Timesteps(nn.Module):
    """The timesteps of a model's tables, in rising order, and what is done about others.

    A child of the model: `values` [timesteps] is saved with it. `unseen` timesteps are computed with the
    row of the nearest one or between two rows, which is warned of once, or refused. What is a function of
    the timestep alone is rounded with its own range then.
    """

    values: Tensor

    def __init__(self, count: int, argument: str, unseen: Unseen = "nearest") -> None:
        """Args:
        count: how many.
        argument: the name of the parameter of the model's `forward` that is given the timestep.
        unseen: what is done about other timesteps.
        """
        super().__init__()
        self.argument, self.unseen = argument, unseen
        self.register_buffer("values", torch.full((count,), torch.nan))
        self._warned = self._accepts = False
        self._tokens: list[Token[Moment | None]] = []

    @classmethod
    def of(cls, values: Sequence[float], argument: str, unseen: Unseen = "nearest") -> "Timesteps":
        """Those of a schedule; repeated ones count once."""
        rising = sorted(set(torch.tensor(values, dtype=torch.float32).tolist()))
        found = cls(len(rising), argument, unseen)
        found.values = torch.tensor(rising)
        return found

    def settings(self) -> dict[str, Any]:
        """Keywords that make one of the same structure."""
        return {"count": len(self.values), "argument": self.argument, "unseen": self.unseen}

    def forward(self, x: Any) -> Any:
        """x: a model that is a container calls all its children, and this is one of them."""
        return x

    def moment(self, timestep: Tensor | float) -> Moment:
        """The rows of a timestep, or of the timesteps of a batch's rows [batch].

        Raises:
            ModelError: if one of them is not known, and these are refused.
        """
        wanted = torch.as_tensor(timestep, dtype=torch.float32, device=self.values.device)
        nearest, seen = self.nearest(wanted)
        if not torch.compiler.is_compiling():
            if bool(seen.all()):
                return Moment(nearest, nearest)
            if not self._accepts:
                self._tell(float(wanted[~seen][0]))
        if self.unseen == "interpolate":
            return replace(self.between(wanted), seen=seen)
        return Moment(nearest, nearest, seen=seen)

    def nearest(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest rows of timesteps, of two as near the later, and whether they are theirs."""
        falling = self.values.flip(0)  # the first of equals is taken
        apart, found = (wanted.unsqueeze(-1) - falling).abs().min(-1)
        seen = torch.sub(apart, wanted.abs(), alpha=_RELATIVE) <= _ABSOLUTE
        return len(falling) - 1 - found, seen

    def between(self, wanted: Tensor) -> Moment:
        """Which two rows timesteps are between, and how far on; beyond the last row that one."""
        upper = torch.searchsorted(self.values, wanted.contiguous()).clamp(max=len(self.values) - 1)
        lower = (upper - 1).clamp(min=0)
        below, above = self.values[lower], self.values[upper]
        share = ((wanted - below) / (above - below)).nan_to_num(0.0).clamp(0, 1)
        return Moment(lower, upper, share)

    @contextmanager
    def accepting(self) -> Iterator[None]:
        """Compute unseen timesteps without a word, even where they are refused, for a while."""
        before, self._accepts = self._accepts, True
        try:
            yield
        finally:
            self._accepts = before

    @contextmanager
    def during(self, timestep: Tensor | float) -> Iterator[None]:
        """Compute parts of the model on their own, at this timestep or those of a batch's rows [batch].

        Raises:
            ModelError: as of `moment`.
        """
        with at(self.moment(timestep)):
            yield

    def attach(self, model: nn.Module) -> None:
        """Look up the timestep at every call of the model.

        Raises:
            ModelError: if the model's `forward` has no such parameter.
        """
        parameters = list(inspect.signature(model.forward).parameters)
        if self.argument not in parameters:
            raise ModelError(
                f"the model's forward has no parameter {self.argument!r}: its parameters are "
                f"{', '.join(parameters)}"
            )
        self._position = parameters.index(self.argument)
        model.add_module(CHILD, self)
        model.register_forward_pre_hook(self._enter, with_kwargs=True)
        model.register_forward_hook(self._leave, always_call=True)

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self.argument in kwargs:
            timestep = kwargs[self.argument]
        elif self._position < len(args):
            timestep = args[self._position]
        else:
            raise ModelError(f"the model was called without {self.argument!r}")
        self._tokens.append(_current.set(self.moment(timestep)))

    def _leave(self, *_: Any) -> None:
        if self._tokens:
            _current.reset(self._tokens.pop())

    def _tell(self, timestep: float) -> None:
        """Refuse an unseen timestep, or warn of the first.

        Raises:
            ModelError: if it is refused.
        """
        known = f"{float(self.values[0]):g} … {float(self.values[-1]):g}, {len(self.values)} of them"
        if self.unseen == "refuse":
            raise ModelError(
                f"timestep {timestep:g} is not among those that the model was calibrated for ({known}): "
                "sample with the calibrated schedule, or give the model ranges for this one with "
                "add_timesteps, which a model with tables in the place of layers can't have"
            )
        if not self._warned:
            self._warned = True
            used = "the nearest one" if self.unseen == "nearest" else "the two beside it"
            warnings.warn(
                f"timestep {timestep:g} is not among those that the model was calibrated for ({known}): "
                "activations of the timestep alone get ranges of their own, other activations and tables "
                f"those of {used}",
                stacklevel=2,
            )


def timesteps_of(model: nn.Module) -> Timesteps | None:
    """The timesteps attached to a model."""
    found = getattr(model, CHILD, None)
    return found if isinstance(found, Timesteps) else None
