"""Skip concatenations that layers read: a grid for each part, and none for the whole."""

import pytest
import torch
from torch import nn

from ptqcore.dataflow import trace
from ptqcore.errors import RecipeError
from ptqcore.grids import make_grids
from ptqcore.modules import quantizable_layers
from ptqcore.recipe import QuantSection, TensorQuant
from ptqcore.split_concatenations import SplitConcatenations
from ptqcore.step import Context, StepOptions


class Net(nn.Module):
    """Any function of two convolutions' outputs, and layers that it may call."""

    def __init__(self, forward):
        super().__init__()
        self.compute = forward
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.z, self.other, self.line = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Linear(8, 4)

    def forward(self, x):
        return self.compute(self, self.a(x), self.b(x))


def split(forward, bits=8, scope="dataflow", timesteps=(), first=lambda grids: None):
    """The grids before and after the step; `first` is done to them before."""
    quant = QuantSection(
        weights=TensorQuant(bits=8), activations=TensorQuant(bits=bits, symmetric=False), scope=scope
    )
    model = Net(forward).eval().requires_grad_(False)
    flow = trace(model, lambda: model(torch.randn(1, 3, 8, 8)))
    targets = {path for path in quantizable_layers(model) if flow.called(path)}
    grids = make_grids(quant, flow, targets, timesteps)
    before = {str(edge): one for edge, one in grids.edges.items()}
    SplitConcatenations(StepOptions(), Context(quant, None, {}, 0, grids, None)).prepare(
        model, flow, lambda: None
    )
    return before, {str(edge): one for edge, one in grids.edges.items()}, grids


def test_the_parts_keep_their_own_grids_and_the_whole_has_none():
    before, after, _ = split(lambda m, a, b: m.z(torch.cat([a, b], 1)))
    assert set(before) - set(after) == {":cat"}
    assert set(after) - set(before) == set()
    assert {"a:conv2d", "b:conv2d"} <= set(after)


def test_parts_of_more_bits_are_rounded_where_they_are_joined():
    before, after, grids = split(lambda m, a, b: m.z(torch.cat([a, b.relu()], 1)), bits=4)
    assert (before["a:conv2d"].bits, before[":cat"].bits) == (8, 4)
    assert set(after) - set(before) == {":cat<0", ":cat<1"}
    assert {name: after[name].bits for name in ("a:conv2d", ":relu", ":cat<0", ":cat<1")} == {
        "a:conv2d": 8,
        ":relu": 8,
        ":cat<0": 4,
        ":cat<1": 4,
    }
    assert all(grids.readers[edge] == {"z"} for edge in grids.edges if str(edge).startswith(":cat"))


@pytest.mark.parametrize("timesteps_first", [True, False])
def test_ranges_for_each_timestep_are_those_of_the_parts_too(timesteps_first):
    def each(grids):
        grids.range_for_each_timestep(["z"])

    given = {"first": each} if timesteps_first else {}
    _, _, grids = split(lambda m, a, b: m.z(torch.cat([a, b], 1)), 4, timesteps=[1, 5], **given)
    each(grids)
    found = {str(edge) for edge, one in grids.edges.items() if one.timesteps == 2}
    assert found == {":cat<0", ":cat<1", "z:conv2d"}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, a, b: m.z(torch.cat([a[:, :2], a[:, 2:], b], 1)),
        lambda m, a, b: m.z(torch.cat([a, a], 1)),
    ],
    ids=["slices", "the same twice"],
)
def test_parts_that_share_a_grid_are_one(forward):
    before, after, _ = split(forward)
    assert before == after


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, a, b: torch.cat([a, b], 1).mean((2, 3), keepdim=True) @ torch.ones(1, 1),
        lambda m, a, b: m.line(torch.cat([a, b], 1)),
        lambda m, a, b: (c := torch.cat([a, b], 1)).mT @ c,
        lambda m, a, b: m.z(torch.cat([a, b], 2).view(1, 8, 8, 8)),
    ],
    ids=["no layer", "not summed over", "a product", "another dimension"],
)
def test_other_concatenations_stay(forward):
    before, after, _ = split(forward)
    assert before == after


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, a, b: m.line(torch.cat([a.permute(0, 2, 3, 1), b.permute(0, 2, 3, 1)], -1)),
        lambda m, a, b: m.z(torch.cat([a, b], -3)),
        lambda m, a, b: (c := torch.cat([a, b], dim=1), m.z(c), m.other(c), c.sigmoid()),
    ],
    ids=["linear", "from behind", "several readers"],
)
def test_channels_are_found(forward):
    before, after, _ = split(forward)
    assert set(before) - set(after) == {":cat"}


def test_in_the_scope_of_layers_it_is_refused():
    with pytest.raises(RecipeError, match=r"quant\.scope is layers: set it to dataflow"):
        split(lambda m, a, b: m.z(torch.cat([a, b], 1)), scope="layers")
