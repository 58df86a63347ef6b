"""The map: of a small network it says exactly what is there."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ptqcore.blocks import find_blocks
from ptqcore.chains import clipping_bounds, find_chains
from ptqcore.dataflow import trace
from ptqcore.decompositions import in_steps
from ptqcore.flowmap import Folding, map_network
from ptqcore.folding import find_norms, fold
from ptqcore.grids import make_grids
from ptqcore.lineage import Lineage
from ptqcore.modules import quantizable_layers
from ptqcore.recipe import QuantSection, TensorQuant
from ptqcore.report.network import FlowMap, Link

IMAGE = (1, 3, 8, 8)
DATAFLOW = QuantSection(
    weights=TensorQuant(bits=8, granularity="channel"),
    activations=TensorQuant(bits=8, symmetric=False),
    scope="dataflow",
)


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = conv(), nn.BatchNorm2d(4), conv()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(x)).relu())


class Network(nn.Module):
    """A stem, a residual block, a concatenation with the stem's output, a parameter and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.join = conv(3), Residual(), nn.Conv2d(8, 4, 1)
        self.offset = nn.Parameter(torch.rand(1, 4, 1, 1))
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.join(torch.cat([self.block(x), x], dim=1)) + self.offset
        return self.head(y.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        return x + self.o(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))


def mapped(model: nn.Module, x: Tensor, quant: QuantSection = DATAFLOW, steps: bool = False) -> FlowMap:
    model.eval().requires_grad_(False)

    def run() -> Tensor:
        return in_steps(lambda: model(x))() if steps else model(x)

    flow = trace(model, run)
    pairs, folded = find_norms(model, flow), fold(model, flow, run)
    flow = trace(model, run) if folded else flow
    targets = {path for path in quantizable_layers(model) if flow.called(path)}
    blocks = find_blocks(model, flow, targets)
    grids = make_grids(quant, flow, targets)
    return map_network(model, flow, blocks, grids, Folding(pairs, folded, 1e-7), {"unused": "not used"})


@pytest.fixture(scope="module")
def network() -> FlowMap:
    torch.manual_seed(0)
    return mapped(Network(), torch.rand(IMAGE))


def test_the_stages_are_the_blocks_and_the_functions_between(network):
    assert [(stage.name, stage.block) for stage in network.stages] == [
        ("stem", True),
        ("block", True),
        ("cat", False),
        ("join", True),
        ("add", False),
        ("head", True),
    ]
    assert [stage.name for stage in network.blocks] == ["stem", "block", "join", "head"]
    assert [len(stage.layers) for stage in network.blocks] == [1, 2, 1, 1]
    assert network.stages[4].functions == ("add", "mean")


def test_it_says_what_flows_in_and_out(network):
    flowing = (1, 4, 8, 8)
    assert network.inputs == (IMAGE,)
    assert network.stages[0].reads == (Link(-1, IMAGE),)
    assert network.stages[2].reads == (Link(1, flowing), Link(0, flowing))
    assert network.stages[5].reads == (Link(4, (1, 4)),)
    assert [stage.makes for stage in network.stages] == [
        (flowing,),
        (flowing,),
        ((1, 8, 8, 8),),
        (flowing,),
        ((1, 4),),
        ((1, 2),),
    ]
    assert [stage.returned for stage in network.stages] == [False] * 5 + [True]


def test_the_parts_of_a_block_say_what_they_read(network):
    parts = network.stages[1].parts
    assert [(part.name, part.function, part.layer, part.reads) for part in parts] == [
        ("block.first", "conv2d", True, (-1,)),
        ("block.second", "conv2d", True, (0,)),
        ("block:add", "add", False, (-1, 1)),
    ]
    assert parts[0].shape == (4, 4, 3, 3)


def test_it_counts_and_lists_exactly_what_is_there(network):
    assert (network.modules, len(network.layers)) == (9, 5)
    assert network.norm_pairs == {"block.norm": "block.first"}
    assert (network.folded, network.difference) == (1, 1e-7)
    assert network.norm_readers == {}
    assert [(c.parameter, c.shape, c.site) for c in network.constants] == [("offset", (1, 4, 1, 1), ":add")]
    assert network.alone == {"unused": "not used"}


def test_it_finds_the_residual_addition_and_the_concatenation(network):
    found = [(join.site, join.kind, [t.source for t in join.tensors]) for join in network.joins]
    assert found == [
        ("block:add", "residual", ["stem", "block.second"]),
        (":cat", "concatenation", ["block:add", "stem"]),
    ]


def test_it_finds_the_layers_in_a_row(network):
    rows = [(row.first, row.between, row.second, row.only_moves) for row in network.rows]
    assert rows == [("block.first", ("relu",), "block.second", False)]


def test_its_edges_are_those_of_the_grids(network):
    names = [edge.name for edge in network.edges]
    assert names[0] == "stem:conv2d<0"
    assert {":cat", "block:add", "block:relu"} <= set(names)
    assert {edge.grid for edge in network.edges} == {"int8 asymmetric per tensor"}


def test_in_the_scope_of_layers_no_edge_is_rounded():
    quant = DATAFLOW.model_copy(update={"scope": "layers"})
    assert mapped(Network(), torch.rand(IMAGE), quant).edges == ()


def test_it_is_json(network):
    assert json.loads(json.dumps(network.to_json()))["norm_pairs"] == {"block.norm": "block.first"}


def test_attention_joins_three_layers_and_a_norm_feeds_them():
    network = mapped(Attention(), torch.arange(5)[None])
    assert network.norm_readers == {"norm": ("q", "k", "v")}
    found = [(join.kind, [t.source for t in join.tensors]) for join in network.joins]
    assert found == [
        ("scaled_dot_product_attention", ["q", "k", "v"]),
        ("residual", ["embed:embedding", "o"]),
    ]


def test_in_steps_its_products_are_joins_of_their_own_with_grids():
    network = mapped(Attention(), torch.arange(5)[None], steps=True)
    found = [(join.site, [t.source for t in join.tensors]) for join in network.joins]
    assert found == [
        (":matmul", ["q", "k"]),
        (":matmul.1", [":matmul", "v"]),
        (":add", ["embed:embedding", "o"]),
    ]
    assert {"q:linear", "k:linear", ":softmax", "v:linear"} <= {edge.name for edge in network.edges}


def test_a_shortcut_through_one_layer_is_residual_and_two_equal_branches_are_a_sum():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.short = conv(3), conv(3), conv(), conv(3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.c(self.a(x)) + self.short(x), self.a(x) + self.b(x)

    network = mapped(Branches(), torch.rand(IMAGE))
    assert [join.kind for join in network.joins] == ["residual", "sum"]


def test_every_tensor_comes_from_one_item_through_functions_of_it_alone():
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y * 0.5 + torch.cat([-y[..., 2:], y[..., :2]], dim=-1)

    model = Rotated().requires_grad_(False)
    flow = trace(model, lambda: model(torch.rand(2, 4)))
    lineage = Lineage(flow)
    assert [lineage.name(index) for index in range(len(lineage.items))] == ["input", "layer"]
    assert lineage.source[flow.called("")[0].outputs[0]] == 1


def test_a_chain_ends_where_its_tensor_is_read_twice_or_returned():
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.b(self.a(x).unsqueeze(1).view(-1, 4))
            z = self.c(y)
            return y, self.d(z) + z

    model = Read().requires_grad_(False)
    chains = find_chains(model, trace(model, lambda: model(torch.rand(2, 4))))
    assert [(chain.first.site.owner, chain.second.site.owner) for chain in chains] == [("a", "b")]
    assert [op.name for op in chains[0].between] == ["unsqueeze", "view"]
    assert chains[0].only_moves


@pytest.mark.parametrize(
    ("function", "bounds"),
    [
        (torch.relu, (0.0, float("inf"))),
        (F.relu6, (0.0, 6.0)),
        (lambda x: x.clamp(0.0, 4), (0.0, 4.0)),
        (lambda x: x.clamp(min=-1, max=None), (-1.0, float("inf"))),
        (lambda x: F.hardtanh(x, -2.0, 2.0), (-2.0, 2.0)),
        (lambda x: x.clamp(max=3), None),
    ],
    ids=["relu", "relu6", "clamp", "no maximum", "hardtanh", "one bound only"],
)
def test_bounds_of_clipping_functions(function, bounds):
    class Clipped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    model = Clipped()
    (op,) = trace(model, lambda: model(torch.rand(2))).ops
    assert clipping_bounds(op) == bounds
