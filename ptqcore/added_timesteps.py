"""Timesteps added to those that a model was calibrated for: of a further schedule, without samples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ptqcore.errors import ModelError
from ptqcore.observers import MinMax
from ptqcore.quantizers import FakeQuant
from ptqcore.tables import tables_in
from ptqcore.timesteps import Timesteps, timesteps_of


@torch.no_grad()
def add_timesteps(
    model: nn.Module, timesteps: Sequence[float], compute: Callable[[float], object]
) -> list[float]:
    """Give a model activation ranges for further timesteps; those that it has stay as they are.

    What is a function of the timestep alone takes one value at each, and gets the range of that, as
    calibration for it would find. Other activations get a range between those of the timesteps on both
    sides, or that of the last one.

    Args:
        model: changed in place, unless an error is raised.
        timesteps: those that it has ranges for are left out.
        compute: computes, at a timestep and at no other, the model or as much of it as depends on the
            timestep alone; of any sample.

    Returns:
        The timesteps that were added, in rising order.

    Raises:
        ModelError: if the model has no ranges for each timestep, has tables in the place of layers, whose
            weights are gone, or `compute` leaves out what depends on the timestep alone.
    """
    known = timesteps_of(model)
    if known is None:
        raise ModelError("the model has no ranges for each timestep: those it has are for any timestep")
    added = _unknown(known, timesteps)
    if not len(added):
        return []
    replaced = next(iter(tables_in(model)), None)
    if replaced is not None:
        raise ModelError(
            f"a table for the calibrated timesteps stands in the place of {replaced!r}, and the layer that "
            "could say more is gone: quantize the full-precision model for the other schedule, or without "
            "tables"
        )
    named = {path: each for path, each in model.named_modules() if isinstance(each, FakeQuant)}
    quantizers = {path: each for path, each in named.items() if each.spec.timesteps}
    ranges = _ranges(
        {path: each for path, each in quantizers.items() if each.spec.of_timestep}, known, added, compute
    )
    values = torch.cat([known.values, added]).sort().values
    moment, new = known.between(values), ~known.nearest(values)[1]
    for path, quantizer in quantizers.items():
        quantizer.add_timesteps(moment, new, ranges.get(path))
    known.values = values
    return [float(value) for value in added]


def _unknown(known: Timesteps, timesteps: Sequence[float]) -> Tensor:
    """Those without a row, in rising order, each once."""
    rising = sorted(set(torch.tensor(timesteps, dtype=torch.float32).tolist()))
    wanted = torch.tensor(rising, device=known.values.device)
    return wanted[~known.nearest(wanted)[1]]


def _ranges(
    alone: Mapping[str, FakeQuant], known: Timesteps, timesteps: Tensor, compute: Callable[[float], object]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Low and high [timesteps] of what these quantizers are given, at each timestep."""
    lows: dict[str, list[Tensor]] = {path: [] for path in alone}
    highs: dict[str, list[Tensor]] = {path: [] for path in alone}
    for timestep in timesteps.tolist():
        observers = {path: MinMax(quantizer.spec) for path, quantizer in alone.items()}
        with known.accepting(), _observing(alone, observers):
            compute(timestep)
        for path, observer in observers.items():
            try:
                low, high = observer.range()
            except ValueError:
                raise ModelError(f"what {path!r} rounds was not computed from the timestep") from None
            lows[path].append(low.reshape(()))
            highs[path].append(high.reshape(()))
    return {path: (torch.stack(lows[path]), torch.stack(highs[path])) for path in alone}


@contextmanager
def _observing(quantizers: Mapping[str, FakeQuant], observers: Mapping[str, MinMax]) -> Iterator[None]:
    """Show observers what quantizers are given, for a while."""

    def observe(path: str, x: Tensor) -> Tensor:
        observers[path].update(x)
        return FakeQuant.forward(quantizers[path], x)

    for path, quantizer in quantizers.items():
        quantizer.forward = partial(observe, path)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for quantizer in quantizers.values():
            del quantizer.forward
