"""What selective focus minimises: errors where lanes are, in the groups of outputs that move them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ptq_lane.adapter import Adapter
from ptq_lane.distortion import default_cap, lane_distortion
from ptq_lane.focus import Focus
from ptq_lane.selection import Selection, Sensitivity, Weights, sensitivities, weighted_mean
from ptqcore import BlockLearner, Objective


class LaneObjective(Objective):
    """Σ over groups λ · Σ w (found − expected)² / Σ w: w of the focus, λ of the selection.

    With `pixels`, plus so many times the mean squared distance in pixels of where candidate lanes are, if
    the family's geometry is differentiable. States are judged by the mean Lane Distortion Score of images
    that are not learned from.
    """

    def __init__(
        self,
        learner: BlockLearner,
        adapter: Adapter,
        focus: Focus,
        selection: Selection,
        iterations: int,
        held_out: Sequence[int],
        pixels: float,
        judged: int,
    ) -> None:
        """Args:
        learner: computes the network, which is one block.
        adapter: reads its outputs.
        focus: the weight of positions.
        selection: the weight of groups.
        iterations: updates of the run.
        held_out: numbers of the samples that states are judged by.
        pixels: how much the loss in pixels counts, 0 for none.
        judged: how often states are judged.
        """
        self.learner, self.adapter = learner, adapter
        self.cap = default_cap(adapter.frame)
        self.pixels = pixels
        self.held_out = held_out
        self.weights = Weights(selection, iterations)
        self.measured: list[tuple[int, dict[str, Sensitivity]]] = []
        self.distortions: list[tuple[int, float]] = []
        self._judge_every = max(1, iterations // judged)
        self._updates = 0
        learner.rounded([0])  # so that the form of the outputs is known
        outputs = [self._exact([sample]) for sample in range(len(learner.exact))]
        self._lanes = [adapter.decode(each)[0] for each in outputs]
        self._focus = [focus.weights(adapter, each) for each in outputs]
        others = [sample for sample in range(len(outputs)) if sample not in held_out] or list(held_out)
        self._probed = others[:: max(1, len(others) // selection.images)][: selection.images]

    def before(self, updates: int) -> None:
        """Measure the groups' sensitivities anew, where that is due."""
        self._updates = updates
        if self.weights.due(updates):
            found = self._rounded(self._probed)
            measured = sensitivities(
                self.adapter,
                self._exact(self._probed),
                found,
                [self._lanes[sample] for sample in self._probed],
                self.cap,
                self._joined(self._probed),
                self.weights.selection.probe_scale,
            )
            self.measured.append((updates, measured))
            self.weights.update(updates, measured)

    def loss(self, predicted: list[Tensor], target: list[Tensor], samples: Sequence[int]) -> Tensor:
        """The weighted errors of all groups, and of the geometry."""
        outputs, wanted = self.learner.structured(predicted), self.learner.structured(target)
        found, expected = self.adapter.heads(outputs), self.adapter.heads(wanted)
        focus = self._joined(samples)
        total = torch.zeros(())
        for name, weight in self.weights.at(self._updates).items():
            if weight:
                square = (found[name] - expected[name]).square()
                total = total + weight * weighted_mean(square, focus[name])
        return total + self.pixels * self._moved(outputs, wanted) if self.pixels else total

    def _moved(self, outputs: Any, wanted: Any) -> Tensor:
        """The mean squared distance in pixels of candidate lanes, up to the cap, where they count."""
        found, expected = self.adapter.geometry(outputs), self.adapter.geometry(wanted)
        if found is None or expected is None:
            return torch.zeros(())
        distance = (found[0] - expected[0]).abs().clamp(max=self.cap)
        weight = expected[1].detach()
        return (distance.square() * weight).sum() / weight.sum().clamp(min=1e-6)

    def state(self) -> dict[str, Any]:
        """What was measured and judged."""
        measured = [
            [updates, {name: [one.rms, one.distortion] for name, one in groups.items()}]
            for updates, groups in self.measured
        ]
        return {"measured": measured, "distortions": self.distortions}

    def go_on(self, state: dict[str, Any]) -> None:
        """Weigh the groups as they were weighed."""
        for updates, groups in state["measured"]:
            self.measured.append((updates, {name: Sensitivity(*pair) for name, pair in groups.items()}))
            self.weights.update(*self.measured[-1])
        self.distortions = [(updates, score) for updates, score in state["distortions"]]

    def judges(self, updates: int) -> bool:
        """Evenly over the run, where images are held out."""
        return bool(self.held_out) and updates % self._judge_every == 0

    def judge(self) -> float:
        """The mean Lane Distortion Score of the images that are held out, in pixels."""
        decoded = self.adapter.decode(self._rounded(self.held_out))
        pairs = zip(self.held_out, decoded, strict=True)
        scores = [lane_distortion(self._lanes[sample], lanes, self.cap) for sample, lanes in pairs]
        self.distortions.append((self._updates, sum(scores) / len(scores)))
        return self.distortions[-1][1]

    def _rounded(self, samples: Sequence[int]) -> Any:
        return self.learner.rounded(samples)

    def _exact(self, samples: Sequence[int]) -> Any:
        return self.learner.structured(self.learner.target(samples))

    def _joined(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """The weights of the positions of each group, for a batch."""
        names = self._focus[0]
        return {name: torch.cat([self._focus[sample][name] for sample in samples]) for name in names}
