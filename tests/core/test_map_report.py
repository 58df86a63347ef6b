"""The drawing of a map, activations in figures, and losses over time, in the report."""

import math
from xml.etree import ElementTree

import pytest
import torch

from ptqcore import audit
from ptqcore.activation_audit import CountClipped, between_record, grid_ends
from ptqcore.blocks import Block
from ptqcore.dataflow import Site
from ptqcore.distributed import Share
from ptqcore.journal import BlockResult, Journal
from ptqcore.packed import QuantizedTensor
from ptqcore.placement import Edge
from ptqcore.plugin import discover
from ptqcore.quantizers import FakeQuant
from ptqcore.report.block_chart import describe, lane_of, layer_class
from ptqcore.report.line_chart import line
from ptqcore.report.map_chart import draw
from ptqcore.report.network import FlowMap, Link, Part, Stage
from ptqcore.report.page import render, render_map
from ptqcore.report.record import ActivationRecord, BlockRecord, RunRecord
from ptqcore.report.sections import norms_text
from ptqcore.spec import QuantSpec

SHAPE = (1, 8, 4, 4)


def conv(name: str, *reads: int, reason: str | None = None) -> Part:
    return Part(name, "conv2d", (8, 8, 3, 3), True, reads, 1, reason)


def block(name: str, *reads: int, residual: bool = False, returned: bool = False) -> Stage:
    parts = [conv(f"{name}.a", -1), conv(f"{name}.b", 0)]
    if residual:
        parts.append(Part(f"{name}:add", "add", SHAPE, False, (-1, 1)))
    links = tuple(Link(stage, SHAPE) for stage in reads)
    return Stage(name, True, tuple(parts), links, (SHAPE,), ("conv2d", "relu", "conv2d"), returned)


def between(name: str, function: str, *reads: int) -> Stage:
    links = tuple(Link(stage, SHAPE) for stage in reads)
    return Stage(name, False, (), links, (SHAPE,), (function,))


def network(*stages: Stage) -> FlowMap:
    return FlowMap(modules=9, functions=5, inputs=(SHAPE,), stages=stages)


def elements(svg: str, tag: str, style: str = "") -> list[ElementTree.Element]:
    found = ElementTree.fromstring(svg).iter(tag)
    return [one for one in found if style in one.attrib.get("class", "").split() or not style]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in elements(svg, "text")]


def test_every_block_is_drawn_with_its_layers_and_what_flows_between():
    svg = draw(network(block("stem", -1), block("body", 0, residual=True), block("head", 1, returned=True)))
    assert {"stem", "body", "head", "a", "b", "+", "2 layers"} <= set(texts(svg))
    assert len(elements(svg, "rect", "chip")) == 6
    assert len(elements(svg, "circle", "join")) == 1
    assert texts(svg).count(" \N{MULTIPLICATION SIGN} ".join(map(str, SHAPE))) == 3
    assert len(elements(svg, "path", "arc")) == 1


def test_what_skips_stages_is_an_arc_each():
    stages = (block("a", -1), block("b", 0), between("", "cat", 1, 0), block("c", 2, returned=True))
    svg = draw(network(*stages))
    assert len(elements(svg, "path", "arc")) == 1
    tips = [title.text for title in elements(svg, "title")]
    assert any((tip or "").startswith("a → : ") for tip in tips)


def test_equal_blocks_in_a_row_are_drawn_once():
    stages = [block("stem", -1), *(block(f"layers.{i}", i, residual=True) for i in range(30))]
    svg = draw(network(*stages[:-1], block("layers.29", 29, residual=True, returned=True)))
    assert "layers.0 … 29" in texts(svg)
    assert "30 equal blocks, 2 layers each" in texts(svg)
    assert len(elements(svg, "rect", "chip")) == 4


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_are_drawn_each(count):
    svg = draw(network(block("stem", -1), *(block(f"l.{i}", i, residual=True) for i in range(count))))
    assert len(elements(svg, "rect", "chip")) == 2 + 2 * count


def test_equal_blocks_that_others_read_are_drawn_each():
    stages = [block(f"l.{i}", i - 1) for i in range(4)]
    svg = draw(network(*stages, between("", "cat", 3, 1)))
    assert "l.1" in texts(svg)


def test_functions_in_a_row_share_a_box():
    stages = (block("a", -1), between("neck.norm", "batch_norm", 0), between("neck.act", "prelu", 1))
    svg = draw(network(*stages, block("b", 2, returned=True)))
    assert "neck: batch_norm · prelu" in texts(svg)
    assert len(elements(svg, "rect", "between")) == 1


def test_lanes_of_overlapping_spans_differ():
    spans = [(0, 5), (1, 2), (2, 4), (1, 4), (4, 9)]
    lanes = lane_of(spans)
    for i, one in enumerate(spans):
        for j, other in enumerate(spans[:i]):
            if one[0] < other[1] and other[0] < one[1]:
                assert lanes[i] != lanes[j]
    assert max(lanes) == 2


def test_layers_are_named_by_what_they_are():
    def part(function: str, shape: tuple[int, ...], groups: int = 1) -> Part:
        return Part("x", function, shape, True, (-1,), groups)

    times = "\N{MULTIPLICATION SIGN}"
    found = [
        part("linear", (10, 20)),
        part("conv2d", (16, 3, 3, 3)),
        part("conv2d", (16, 8, 1, 1)),
        part("conv2d", (32, 1, 5, 5), 32),
        part("conv2d", (32, 4, 3, 3), 8),
        part("conv_transpose2d", (8, 4, 2, 2)),
    ]
    assert [describe(one) for one in found] == [
        "20→10",
        f"3{times}3 3→16",
        f"1{times}1 8→16",
        f"5{times}5 dw 32",
        f"3{times}3 32→32 /8",
        f"2{times}2 8→4 ↑",
    ]
    assert [layer_class(one) for one in found] == ["k1", "k0", "k3", "k2", "k0", "k4"]


@pytest.mark.parametrize("hostile", ["<script>", '"><img onerror=x>', "a\x00&\ud800"])
def test_hostile_names_are_text(hostile):
    stages = (block(hostile, -1), between(hostile, hostile, 0), block("z", 1, returned=True))
    svg = draw(network(*stages))
    assert len(elements(svg, "rect", "chip")) == 4
    page = render_map(network(*stages), hostile, hostile)
    assert "<script>" not in page
    assert "<img" not in page


def test_it_says_how_many_norms_were_folded_and_what_that_changes():
    pairs = {"a.norm": "a", "b.norm": "b"}
    assert norms_text(network()) == ""
    both = FlowMap(9, 5, (), (), norm_pairs=pairs, folded=2, difference=3e-7)
    assert norms_text(both) == (
        "2 batch norms folded into the layers before, the outputs differ by 3e-7 of the largest."
    )
    one = FlowMap(9, 5, (), (), norm_pairs=pairs, folded=1, difference=0.0)
    assert norms_text(one).startswith("1 of 2 batch norms folded into")


def test_a_layer_in_full_precision_says_why():
    stage = Stage("head", False, (conv("head", -1, reason="output head"),), (Link(-1, SHAPE),), (), ("x",))
    assert any("output head" in (tip.text or "") for tip in elements(draw(network(stage)), "title"))


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0],
        [3.0, 2.0, 1.0],
        [1e3, 1.0, 1e-3],
        [0.0, 0.0],
        [math.nan],
        [1.0, math.inf, 2.0],
        [1e308, 1.0],
    ],
)
def test_lines_parse_whatever_the_values(values):
    svg = line(values, "block")
    (curve,) = elements(svg, "path", "curve")
    assert "nan" not in curve.attrib["d"]
    assert "inf" not in curve.attrib["d"]
    assert "block" in texts(svg)


def test_lines_over_decades_are_logarithmic():
    curve = elements(line([100.0, 10.0, 1.0], "x"), "path", "curve")[0].attrib["d"]
    heights = [float(point.split()[1]) for point in curve.replace("M", "L").split("L")[1:]]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1])


def test_losses_are_thinned_to_means_of_equal_parts():
    assert audit.thinned([]) == ()
    assert audit.thinned([3.0, 1.0]) == (3.0, 1.0)
    thin = audit.thinned([float(i) for i in range(1000)])
    assert len(thin) == 100
    assert thin[0] == pytest.approx(4.5)
    assert thin[-1] == pytest.approx(994.5)
    assert len(audit.thinned([1.0] * 101)) == 100


def quantizer(**spec: object) -> FakeQuant:
    made = FakeQuant(QuantSpec(**spec))
    made.set_range(torch.tensor([-1.0]), torch.tensor([2.0]))
    return made


EDGE = Edge(Site("a", 0, "relu", 0), "output")


def test_a_grid_covers_what_its_codes_reach():
    low, high = grid_ends(quantizer(bits=8, symmetric=False))
    assert (low, high) == pytest.approx((-1.0, 2.0), abs=0.01)
    assert grid_ends(quantizer(bits=2)) == (-4.0, 2.0)
    low, high = grid_ends(quantizer(dtype="e4m3"))
    assert (low, high) == pytest.approx((-2.0, 2.0))


def test_clipped_values_are_counted_while_they_are_rounded():
    made = quantizer(bits=8, symmetric=False)
    counted = CountClipped({EDGE: made})
    x = torch.tensor([-5.0, -1.0, 0.0, 1.0, 2.0, 9.0, 2.5, 0.5])
    assert torch.equal(counted.functions()[EDGE](x), made(x))
    (record,) = counted.records("block", Share(2))
    assert (record.name, record.block, record.clipped) == (str(EDGE), "block", 3 / 8)
    assert record.scale == pytest.approx(3 / 255)
    assert between_record(EDGE, made, [x, x[:4]], [None, None], Share(2)).clipped == 4 / 12


def test_an_edge_that_was_not_reached_has_no_record():
    assert CountClipped({EDGE: quantizer()}).records("block", Share(2)) == []


def test_the_report_shows_the_map_the_activations_and_the_losses():
    record = RunRecord("vision", "w8a8", map=network(block("body", -1, returned=True)))
    record.blocks = [BlockRecord("body", 0.1, 1.0, 10, (3.0, 2.0, 1.0)), BlockRecord("head", 0.1, 1.0, 10)]
    record.activations = [
        ActivationRecord("body.act:relu", "body", "int8 per tensor", (0.0, 6.0), 0.0235, 0.0125),
        ActivationRecord("body.a", "body", "int8 per tensor", (-1.0, 1.0), 0.01, None),
    ]
    page = render(record)
    for words in ("Dataflow map", "9 modules", "Activations", "1.25 %", "0 … 6", "Reconstruction loss"):
        assert words in page
    assert page.count('class="line"') == 1


def test_a_report_without_them_has_no_such_sections():
    page = render(RunRecord("p", "r"))
    assert 'id="map"' not in page
    assert 'id="activations"' not in page
    assert 'id="losses"' not in page


def test_the_journal_keeps_losses_activations_and_new_biases(tmp_path):
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False)))

    weight = QuantSpec(bits=8, granularity="channel")
    first = Block(model(), "0")
    layer = first.model[0][0].weight.detach()
    ends = (layer.amin(1, keepdim=True).clamp(max=0), layer.amax(1, keepdim=True).clamp(min=0))
    quantized = first.quantize_layer("0.0", QuantizedTensor.from_range(layer, *ends, weight), None)
    quantized.ensure_bias().data += 2.0
    activation = ActivationRecord("0:add", "0", "int8 per tensor", (-1.0, 1.0), 0.01, None)
    result = BlockResult(BlockRecord("0", 0.1, 1.0, 10, (2.0, 1.0)), [], [activation])
    Journal(tmp_path, {}, False, discover().attachment).save(0, first, result, {})
    second = Block(model(), "0")
    restored = Journal(tmp_path, {}, True, discover().attachment).restore(0, second)
    assert restored is not None
    assert restored[0] == result
    assert torch.equal(second.module(torch.ones(1, 4)), first.module(torch.ones(1, 4)))
