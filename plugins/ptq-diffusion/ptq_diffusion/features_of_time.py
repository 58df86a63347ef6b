"""The temporal features of any list of timesteps, computed without the rest of the denoiser."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall, other_times
from ptq_diffusion.recording import Recording, record
from ptq_diffusion.temporal import TemporalMap
from ptqcore import ModelError, relative_difference, timesteps_of

_SAME = 1e-5


def temporal_features(
    model: nn.Module, call: DenoiserCall, temporal: TemporalMap, timesteps: Sequence[float] | Tensor
) -> dict[str, Tensor]:
    """What the layers that give temporal features return at some timesteps: path → [T, channels].

    Arguments and errors are those of `TimePath`, which serves where features are asked for repeatedly.
    """
    with torch.no_grad():
        return TimePath(model, call, temporal)(timesteps)


class TimePath:
    """The way from the timestep to the temporal features, recorded in one pass of the denoiser.

    Called with timesteps [T], it returns path → [T, channels] (or what dimensions the layer's output has
    behind the rows), differentiable in the parameters. The layers of the temporal block are called as they
    then are, with their hooks, even if they were replaced since; the functions between them are those of
    the recorded pass. Of a layer that is called several times, the first call counts.

    Where the call has one timestep per row, as many timesteps are computed at once as it has rows (see
    `DenoiserCall.with_rows`), else one.
    """

    def __init__(self, model: nn.Module, call: DenoiserCall, temporal: TemporalMap) -> None:
        """Args:
        model: the denoiser.
        call: an example call; its sample may be small, as no feature depends on it.
        temporal: the map of the denoiser.

        Raises:
            ModelError: if a feature cannot be computed from the timestep alone, because Python code between
                the layers reads the time as a number, or mixes it with the sample.
        """
        self.model, self.features = model, temporal.features
        self._call = call.with_tensor_time()
        time = self._call.times
        self._rows = call.rows if time.ndim and time.shape[0] == call.rows else 1
        layers = temporal.block + temporal.layers("constant")
        self._recording = record(model, self._call, layers, self.features)
        other = self._call.with_timestep(self._another(time))
        self._check(other.times, record(model, other, layers, self.features))

    def __call__(self, timesteps: Sequence[float] | Tensor) -> dict[str, Tensor]:
        """path → features [T, channels] of timesteps [T]."""
        found: dict[str, list[Tensor]] = {path: [] for path in self.features}
        for part in torch.as_tensor(timesteps).split(self._rows):
            outputs = self._replay(self._time(part))
            for path in self.features:
                found[path].append(self._one_each(path, outputs[path])[: len(part)])
        return {path: torch.cat(parts) for path, parts in found.items()}

    def _another(self, time: Tensor) -> Tensor:
        """Another time of every row; one that is known, where the denoiser knows some."""
        known = timesteps_of(self.model)
        if known is None or len(known.values) < 2:
            return other_times(time, 0)
        at = torch.searchsorted(known.values, time.float().contiguous())
        return known.values[(at + 1) % len(known.values)]

    def _replay(self, time: Tensor) -> dict[str, Tensor]:
        """The features at a time; activations with a range for each timestep get theirs."""
        known = timesteps_of(self.model)
        of_rows = time if time.ndim < 2 else time[:, 0]
        with nullcontext() if known is None else known.during(of_rows):
            return self._recording.replay(self.model, time)

    def _time(self, part: Tensor) -> Tensor:
        """The tensor that the denoiser is given as the time; a part that is too short is filled up."""
        filled = torch.cat([part, part[-1:].expand(self._rows - len(part))])
        return self._call.with_timestep(filled if self._is_by_row else filled[0]).times

    @property
    def _is_by_row(self) -> bool:
        return self._call.times.ndim > 0 and self._rows == self._call.times.shape[0]

    def _one_each(self, path: str, output: Tensor) -> Tensor:
        """The output of each row: of its first token, where every token is given a time."""
        if not self._is_by_row:
            return output[:1]
        if output.shape[0] % self._rows:
            raise ModelError(
                f"layer {path!r} returns {list(output.shape)} for {self._rows} rows: a temporal feature "
                "has one row for each of them"
            )
        return output.unflatten(0, (self._rows, -1))[:, 0]

    def _check(self, time: Tensor, whole: Recording) -> None:
        """At another time than the recorded one, what is computed alone is what the whole computes."""
        with torch.no_grad():
            alone = self._replay(time)
        for path in self.features:
            one, other = whole.values.get(path), alone.get(path)
            if one is None or other is None or not relative_difference([one], [other]) < _SAME:
                raise ModelError(
                    f"the temporal feature of {path!r} cannot be computed from the timestep alone: before "
                    "this layer the model's code reads the time as a number, or mixes it with the sample"
                )
