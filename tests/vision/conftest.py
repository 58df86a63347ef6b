"""Small pictures, small models, and tasks made of them."""

import numpy as np
import pytest
from PIL import Image

from ptq_vision.classification import Classification
from ptq_vision.segmentation import Segmentation
from ptqcore.recipe import validate

MODULE = '''
import torch
from torch import nn


class Corner(nn.Module):
    """Classifies by the first pixel: the logits of three classes are its red, green and blue."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1, bias=False)
        self.mix.weight.data = torch.eye(3)[:, :, None, None]

    def forward(self, x):
        return {"scores": self.mix(x)[:, :, 0, 0], "image": x}


class Pixels(Corner):
    """Segments by colour."""

    def forward(self, x):
        return [self.mix(x)]


class Coarse(Corner):
    """Segments by colour, at half the resolution."""

    def forward(self, x):
        return (self.mix(x)[:, :, ::2, ::2],)


class Picky(Corner):
    def forward(self, x):
        raise ValueError("sides must be divisible by 7")


one_corner = Corner()
activated = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True))
number = 3


def broken():
    raise OSError("no disk")
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The name of an importable module with the models above."""
    folder = tmp_path / "importable"
    folder.mkdir()
    (folder / "tiny_vision_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(folder)
    yield "tiny_vision_nets"
    __import__("sys").modules.pop("tiny_vision_nets", None)


@pytest.fixture
def picture():
    """Random pixels [h, w, 3] of a seed."""

    def picture(height=8, width=8, seed=0):
        return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)

    return picture


@pytest.fixture
def folder(tmp_path, picture):
    """Writes pictures into a folder, by name: pixels, a colour to fill it with, or None for random ones."""

    def folder(pictures, name="pictures"):
        for seed, (file, pixels) in enumerate(pictures.items()):
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if pixels is None:
                pixels = picture(seed=seed)
            if isinstance(pixels, tuple):
                pixels = np.full((8, 8, 3), pixels, dtype=np.uint8)
            Image.fromarray(pixels).save(path)
        return tmp_path / name

    return folder


@pytest.fixture
def task(tmp_path):
    """A task, its options validated as those of a recipe are."""

    def task(kind, seed=0, **options):
        kinds = {"classification": Classification, "segmentation": Segmentation}
        return kinds[kind](validate(kinds[kind].Options, options, "task"), seed, tmp_path)

    return task
