"""Convolutions that make several groups of outputs become one for each."""

import pytest
import torch
from torch import nn

from ptq_lane import Adapter, Frame
from ptq_lane.split_heads import SplitHead, find_splits, split

X = torch.randn(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """One convolution makes scores and offsets, another scores alone; a third is mixed again behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 6, 1)
        self.other = nn.Conv2d(4, 2, 3, padding=1, bias=False)
        self.tail = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(x).permute(0, 2, 3, 1).flatten(1, 2), self.other(x), self.tail(x).softmax(1)


class Reads(Adapter):
    name = "reads"
    scores = slice(0, 2)

    def heads(self, outputs):
        mixed, other, tail = outputs
        rest = [place for place in range(6) if place not in range(6)[self.scores]]
        return {
            "scores": mixed[..., self.scores],
            "offsets": mixed[..., rest[0] : rest[-1] + 1],
            "other": other,
            "tail-a": tail[:, :2],
            "tail-b": tail[:, 2:],
        }

    def confidence(self, outputs):
        return {}

    def decode(self, outputs):
        return []


def adapter(scores=slice(0, 2)):
    found = Reads(Frame(8, 6))
    found.scores = scores
    return found


@pytest.mark.parametrize(
    ("scores", "groups"), [(slice(0, 2), [[0, 1], [2, 3, 4, 5]]), (slice(4, 6), [[4, 5], [0, 1, 2, 3]])]
)
def test_channels_of_different_groups_are_told_apart(scores, groups):
    model = Mixed().eval()
    assert find_splits(model, adapter(scores), lambda: model(X)) == {"head": groups}


@pytest.mark.parametrize("scores", [slice(0, 2), slice(4, 6)])
def test_the_network_computes_the_same(scores):
    model = Mixed().eval()
    before = model(X)
    split(model, find_splits(model, adapter(scores), lambda: model(X)))
    assert isinstance(model.head, SplitHead)
    for one, other in zip(before, model(X), strict=True):
        torch.testing.assert_close(one, other)


def test_channels_that_two_groups_share_stay_together():
    class Overlapping(Reads):
        def heads(self, outputs):
            return {"one": outputs[0][..., :4], "two": outputs[0][..., 2:]}

    model = Mixed().eval()
    assert find_splits(model, Overlapping(Frame(8, 6)), lambda: model(X)) == {}
