"""What steps share that treat the temporal block on its own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.temporal import TemporalMap, find_temporal
from ptqcore import Dataflow, ModelError, Step


class TemporalStep(Step):
    """Finds the temporal block of the denoiser before anything is changed."""

    def find(self, model: nn.Module, flow: Dataflow, run: Callable[[], object]) -> TemporalMap:
        """The temporal map; `call` is then the call of the traced pass, `timesteps` those of the schedule.

        Raises:
            ModelError: if the calibration samples have no timesteps.
        """
        self.timesteps = self.context.grids.timesteps
        if not self.timesteps:
            raise ModelError(
                f"the step {self.name} is for denoisers: the task's calibration samples have no timesteps"
            )
        calls: list[DenoiserCall] = []

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(DenoiserCall.of(model, *args, **kwargs).copied())

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            run()
        finally:
            handle.remove()
        self.call = calls[0]
        return find_temporal(model, flow, self.call)

    @property
    def times_of_rows(self) -> Tensor:
        """The time of the traced call, one for all its rows or one for each [rows]."""
        times = self.call.times
        return times if times.ndim < 2 else times[:, 0]
