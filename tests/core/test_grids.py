"""Which grid every weight and activation gets."""

import torch
from tiny_task import W3A4
from torch import nn

from ptqcore.dataflow import trace
from ptqcore.grids import make_grids
from ptqcore.modules import quantizable_layers
from ptqcore.recipe import QuantSection


class Net(nn.Module):
    """Two stems, a residual body, two heads."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.body, self.tail = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.scores, self.boxes = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.left(x).relu() + self.right(x)
        x = self.tail((x + self.body(x)).relu())
        return self.scores(x), self.boxes(x)


EDGES = {
    "left:conv2d<0": 4,
    ":relu": 8,
    "right:conv2d<0": 4,
    "right:conv2d": 8,
    ":add": 4,
    "body:conv2d": 8,
    ":relu.1": 4,
    "tail:conv2d": 4,
    "scores:conv2d": 8,
    "boxes:conv2d": 8,
}


def grids_of(without=(), **changes):
    model = Net().eval()
    flow = trace(model, lambda: model(torch.randn(1, 3, 6, 6)))
    return make_grids(
        QuantSection.model_validate(W3A4 | changes), flow, set(quantizable_layers(model)) - set(without)
    )


def test_without_bits_of_their_own_first_and_last_layers_are_like_all():
    """And what only sums read, or nothing, has 8 bits."""
    grids = grids_of()
    assert {grids.weights(path).bits for path in quantizable_layers(Net())} == {3}
    assert {str(edge): quant.bits for edge, quant in grids.edges.items()} == EDGES


def test_layers_that_read_the_image_are_first_and_those_that_nothing_reads_last():
    assert grids_of().ends == {"left", "right", "scores", "boxes"}


def test_layers_left_out_are_neither_first_nor_last():
    assert grids_of(without=["left", "right", "scores", "boxes"]).ends == {"body", "tail"}


def test_first_and_last_layers_have_weights_of_their_own_bits():
    grids = grids_of(first_last_bits=8)
    bits = {path: grids.weights(path).bits for path in quantizable_layers(Net())}
    assert bits == {"left": 8, "right": 8, "body": 3, "tail": 3, "scores": 8, "boxes": 8}
    assert grids.weights("left").granularity == "channel"


def test_layers_of_another_width_than_the_recipes_are_exceptions_with_a_reason():
    layers = list(quantizable_layers(Net()))
    grids = grids_of(first_last_bits=8)
    grids.bits["body"], grids.bits["tail"] = 6, 3
    at_ends = "8 bits, as a first or last layer (quant.first_last_bits)"
    assert grids.exceptions(layers) == {
        "left": at_ends,
        "right": at_ends,
        "body": "weights of 6 bits, as a step chose",
        "scores": at_ends,
        "boxes": at_ends,
    }
    assert grids.exceptions(["tail"]) == {}
    assert grids_of().exceptions(layers) == {}


def test_what_flows_in_and_out_of_them_has_those_bits_too():
    edges = {str(edge): quant.bits for edge, quant in grids_of(first_last_bits=8).edges.items()}
    assert edges == EDGES | {"left:conv2d<0": 8, "right:conv2d<0": 8, "tail:conv2d": 8}


def test_in_the_scope_of_layers_every_layer_rounds_its_own_input():
    grids = grids_of(scope="layers", first_last_bits=8)
    assert grids.edges == {}
    assert grids.inputs("left").bits == 8
    assert grids.inputs("body").bits == 4


def test_in_the_scope_of_the_dataflow_layers_round_nothing_themselves():
    assert grids_of().inputs("body") is None


def test_without_activations_nothing_but_weights_is_rounded():
    for scope in ("layers", "dataflow"):
        grids = grids_of(activations=None, scope=scope)
        assert grids.edges == {}
        assert grids.inputs("body") is None
