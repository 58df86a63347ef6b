"""Train the small lane networks that ptq-lane ships, on rendered roads.

    python tools/train_lanes.py --family all|NAME [--epochs N] [--scenes N] [--seed N] [--output FOLDER]

Families: segmentation, row-anchor, anchor, keypoint, curve; what each learns is in tools/lane_targets.

Recipe: scenes of series 2, half of them mirrored, with random contrast and brightness; 32 a step; AdamW,
learning rate with a warm-up of one epoch and a cosine to 0, weight decay 0.01, gradients cut to a norm
of 1; moving average of the weights. F1 is CULane's on 300 scenes of series 0, with lines 4 pixels wide.
One thread for training, a process for every core for rendering; the same seed gives the same bytes.

What ships was trained with the defaults, `--family NAME`, after two CPU-minutes of rendering:

    segmentation  F1 0.973  505 CPU-seconds  126,061 parameters
    row-anchor    F1 0.965  338 CPU-seconds  224,736 parameters
    anchor        F1 0.967  401 CPU-seconds  103,829 parameters
    keypoint      F1 0.974  446 CPU-seconds   95,846 parameters
    curve         F1 0.975  686 CPU-seconds  146,313 parameters, --epochs 40
"""

import argparse
import math
import os
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from lane_targets import FAMILIES, Family, family, mirrored
from numpy.typing import NDArray
from torch import Tensor, nn

from ptq_lane import Frame, Lanes
from ptq_lane.metrics.culane import Counts, count
from ptq_lane.networks.images import HEIGHT, WIDTH, normalised
from ptq_lane.scenes import Scene, Scenes
from ptqcore import say, track, write_tensors

_BATCH = 32
_RATE = 3e-3
_AVERAGE = 0.998
# Series 0 is what ptq-lane evaluates on, and series 1 what it calibrates on.
_SEEN, _UNSEEN = 2, 0
_UNSEEN_SCENES = 300
_OVERLAP = 0.5
_FRAME = Frame(WIDTH, HEIGHT)
_WEIGHTS = Path(__file__).parents[1] / "plugins/ptq-lane/ptq_lane/weights"


@dataclass(frozen=True)
class Road:
    """Rendered scenes: images uint8 [scenes, h, w, 3] and the lanes of each."""

    images: Tensor
    lanes: list[Lanes]


def render(count: int, seed: int, series: int) -> Road:
    """Render scenes with a process for every core."""
    scenes = Scenes(count, seed, series, WIDTH, HEIGHT)
    with Pool(os.cpu_count()) as pool:
        drawn = pool.imap(partial(_scene, scenes), range(count), chunksize=16)
        found = list(track(drawn, "rendering", total=count))
    return Road(torch.from_numpy(np.stack([s.image for s in found])), [s.lanes for s in found])


def _scene(scenes: Scenes, index: int) -> Scene:
    return scenes[index]


class Training:
    """One network on its way from random weights."""

    def __init__(self, learner: Family, road: Road, seed: int) -> None:
        torch.manual_seed(seed)
        self.learner = learner
        self.images = road.images
        straight = _stacked([learner.targets(lanes, _FRAME) for lanes in road.lanes])
        mirror = _stacked([learner.targets(mirrored(lanes, _FRAME), _FRAME) for lanes in road.lanes])
        self.targets = {name: torch.stack([straight[name], mirror[name]]) for name in straight}
        self.model = learner.network().train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.01)
        self.steps = 0

    def epoch(self, number: int, epochs: int) -> float:
        """Show every scene once; the mean loss."""
        steps = len(self.images) // _BATCH
        losses = []
        for step, chosen in enumerate(torch.randperm(len(self.images))[: steps * _BATCH].view(-1, _BATCH)):
            done = number + step / steps
            rate = _RATE * min(1, done + 1 / steps) * (1 + math.cos(math.pi * done / epochs)) / 2
            self.optimizer.param_groups[0]["lr"] = rate
            losses.append(self._step(chosen))
        return float(np.mean(losses))

    def _step(self, chosen: Tensor) -> float:
        turned = torch.rand(_BATCH) < 0.5
        images = normalised(self.images[chosen])
        images = torch.where(turned[:, None, None, None], images.flip(3), images)
        contrast, brightness = torch.rand(2, _BATCH, 1, 1, 1) - 0.5
        images = images * (1 + 0.4 * contrast) + 0.6 * brightness
        outputs = self.model(images.contiguous(memory_format=torch.channels_last))
        wanted = {name: values[turned.long(), chosen] for name, values in self.targets.items()}
        loss = self.learner.loss(outputs, wanted)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self._follow()
        return loss.item()

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the model, faster in the beginning."""
        self.steps += 1
        share = max(1 - _AVERAGE, 9 / (9 + self.steps))
        for kept, current in zip(
            self.average.state_dict().values(), self.model.state_dict().values(), strict=True
        ):
            if kept.is_floating_point():
                kept.lerp_(current, share)
            else:
                kept.copy_(current)


def _stacked(targets: list[dict[str, NDArray]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([one[name] for one in targets])) for name in targets[0]}


@torch.no_grad()
def score(learner: Family, model: nn.Module, road: Road) -> float:
    """F1 of the lanes that a model finds, by CULane's rule."""
    adapter = learner.adapter(_FRAME)
    batches = torch.split(road.images, 100)
    found = [lanes for images in batches for lanes in adapter.decode(model(normalised(images)))]
    counts = [
        count(lanes.points(), labelled.points(), _FRAME, (_OVERLAP,))[_OVERLAP]
        for lanes, labelled in zip(found, road.lanes, strict=True)
    ]
    return sum(counts, Counts()).f1


def train(name: str, road: Road, unseen: Road, epochs: int, seed: int, output: Path) -> None:
    """Train one family, measure it, and save its weights."""
    begin = time.process_time()
    training = Training(family(name), road, seed)
    for number in range(epochs):
        loss = training.epoch(number, epochs)
        if (number + 1) % 5 == 0 or number + 1 == epochs:
            reached = score(training.learner, training.average, unseen)
            seconds = time.process_time() - begin
            done = f"{name}, epoch {number + 1} of {epochs}"
            say(f"{done}: loss {loss:.4f}, F1 {reached:.4f}, {seconds:.0f} CPU-s")
    state = training.average.state_dict()
    write_tensors(output / f"{name}.safetensors", state)
    parameters = sum(parameter.numel() for parameter in training.average.parameters())
    size = (output / f"{name}.safetensors").stat().st_size
    say(f"{name}: {parameters:,} parameters, {size:,} bytes")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("all", *FAMILIES), required=True)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--scenes", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=_WEIGHTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    chosen.output.mkdir(parents=True, exist_ok=True)
    road = render(chosen.scenes, chosen.seed, _SEEN)
    unseen = render(_UNSEEN_SCENES, chosen.seed, _UNSEEN)
    for name in FAMILIES if chosen.family == "all" else (chosen.family,):
        train(name, road, unseen, chosen.epochs, chosen.seed, chosen.output)


if __name__ == "__main__":
    main()
