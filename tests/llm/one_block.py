"""One block of a model at work, without a whole run: what tests of steps share."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ptqcore import Block, Calibration, Context, QuantSection, Step, TensorQuant
from ptqcore.dataflow import trace
from ptqcore.grids import Grids
from ptqcore.plan import make_observer
from ptqcore.plugin import discover
from ptqcore.walk import Walk


class OneBlock:
    """The block at `path` of a model, and its calibration by samples that are the model's inputs."""

    def __init__(
        self,
        model: nn.Module,
        path: str,
        samples: Sequence[Any],
        quant: dict[str, Any],
        masks: Sequence[Tensor] | None = None,
    ) -> None:
        self.model, self.block = model.eval().requires_grad_(False), Block(model, path)
        if hasattr(model, "config"):
            model.config.use_cache = False  # a block is run many times on the same inputs
        self.samples = samples
        section, registry = QuantSection.model_validate(quant), discover()

        def observer(wanted: TensorQuant) -> Any:
            return make_observer(registry, "llm", wanted)

        grids = Grids(section)
        self.context = Context(section, observer, {}, 0, grids, None)
        io = next(iter(Walk([self.block], samples, model, exact=True)))
        exact = io.run_tensors(exact=True)
        self.calibration = Calibration(self.block, io, grids, observer, exact, masks)
        _ = self.calibration.targets

    def step(self, kind: type[Step], **options: Any) -> Step:
        """A step of the block's recipe, prepared."""
        made = kind(kind.Options(**options), self.context)
        with torch.no_grad():
            run = partial(self.model, self.samples[0])
            made.prepare(self.model, trace(self.model, run), run)
        return made
