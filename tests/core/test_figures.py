"""What a task shows of its results: curves and pictures, as drawings and in the report of a run."""

import base64
import io
import math
import re
from collections.abc import Sequence
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_report import Page, full_record
from tiny_task import TinyTask, run
from torch import Tensor, nn

from ptqcore import Curves, Pictures, PluginError
from ptqcore.report import charts
from ptqcore.report.page import render
from ptqcore.report.png import png

HOSTILE = '</title></svg><script>"&amp;'


def shades(*shape: int, seed: int = 0) -> Tensor:
    """An image of values that bytes hold exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator) / 255


def decoded(file: bytes) -> Tensor:
    """An image [channels, h, w], by another reader."""
    image = Image.open(io.BytesIO(file))
    image.load()
    assert image.mode in ("L", "RGB")
    return torch.tensor(list(image.tobytes())).view(image.height, image.width, -1).movedim(2, 0) / 255


def svg_of(figure: Curves) -> ElementTree.Element:
    return ElementTree.fromstring(str(figure.draw().svg))


def texts(figure: Curves) -> list[str]:
    return [element.text or "" for element in svg_of(figure).iter("text")]


def drawn(figure: Curves, style: str) -> list[list[tuple[float, float]]]:
    """The lines of a curve, each of points."""
    (path,) = (path for path in svg_of(figure).iter("path") if path.get("class") == style)
    lines = [line for line in path.attrib["d"].split("M") if line]
    return [[tuple(map(float, point.split())) for point in line.split("L")] for line in lines]  # type: ignore[misc]


def curves(values: Sequence[float], x: Sequence[float] | None = None, **keys: str) -> Curves:
    return Curves("error", range(len(values)) if x is None else x, {"a": values}, "step", **keys)


# PNG


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (3, 4, 7), (3, 300, 2)])
def test_another_reader_finds_every_pixel(shape: tuple[int, int, int]) -> None:
    image = shades(*shape)
    assert torch.equal(decoded(png(image)), image)
    assert torch.equal(decoded(png(image.mT.contiguous().mT)), image)


def test_shades_are_rounded_to_bytes_and_what_is_no_shade_is_drawn_all_the_same() -> None:
    image = torch.tensor([[[0.4 / 255, 0.6 / 255, -3.0, 7.0, math.nan, math.inf, -math.inf]]])
    assert (decoded(png(image)) * 255).flatten().tolist() == [0, 1, 0, 255, 0, 255, 0]


# Curves


def test_a_curve_goes_through_its_points_on_even_axes() -> None:
    ((first, middle, last),) = drawn(curves([1.0, 2.0, 4.0], [0, 5, 10]), "k0")
    assert middle[0] - first[0] == pytest.approx(last[0] - middle[0], abs=0.11)
    assert middle[1] - last[1] == pytest.approx(2 * (first[1] - middle[1]), abs=0.21)
    assert first[0] < last[0]
    assert first[1] > last[1]


def test_x_is_drawn_where_it_is_not_in_the_order_given() -> None:
    ((first, second, third),) = drawn(curves([1.0, 1.0, 1.0], [900, 0, 450]), "k0")
    assert second[0] < third[0] < first[0]


def test_axes_have_numbers_and_say_what_they_are() -> None:
    figure = Curves("t", range(1, 7), {"a": [5.0] * 6}, "step of the schedule", "relative error")
    found = texts(figure)
    assert {"1", "2", "3", "4", "5", "6", "step of the schedule", "relative error"} <= set(found)
    steps = texts(Curves("t", range(0, 26), {"a": [1.0] * 26}, "step"))
    assert {"0", "5", "10", "15", "20", "25"} <= set(steps)
    assert {"2.5", "7.5"}.isdisjoint(steps)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 9.9], "error"),
        ([1.0, 10.0], "error (log scale)"),
        ([-1.0, 1.0, 1000.0], "error"),
        ([0.0, 1.0, 9.0], "error"),
        ([0.0, 1.0, 100.0], "error (log scale, without zeros)"),
    ],
)
def test_values_over_a_decade_get_a_log_axis_that_says_so(values: list[float], expected: str) -> None:
    assert expected in texts(curves(values, y_label="error"))


def test_decades_are_evenly_apart_on_a_log_axis() -> None:
    ((one, ten, hundred),) = drawn(curves([1.0, 10.0, 100.0]), "k0")
    assert one[1] - ten[1] == pytest.approx(ten[1] - hundred[1], abs=0.11)


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf, 1e305])
def test_what_has_no_place_leaves_a_gap(gap: float) -> None:
    figure = curves([1.0, 2.0, gap, 2.0, 1.0])
    assert [len(line) for line in drawn(figure, "k0")] == [2, 2]
    assert len(drawn(curves([1.0, 2.0, 1.0, 2.0], [0, 1, gap, 3]), "k0")) == 2


def test_zero_leaves_a_gap_on_a_log_axis_alone() -> None:
    assert [len(line) for line in drawn(curves([1.0, 0.0, 100.0]), "k0")] == [1, 1]
    assert [len(line) for line in drawn(curves([1.0, 0.0, 2.0]), "k0")] == [3]


def test_every_series_has_a_colour_that_the_legend_explains() -> None:
    figure = Curves("t", [0, 1], {str(index): [index, 1.0] for index in range(9)}, "x")
    legend = figure.draw().legend
    assert list(legend.items())[:2] == [("0", "k0"), ("1", "k1")]
    assert legend["8"] == "other"
    styles = [path.get("class") for path in svg_of(figure).iter("path")]
    assert [style for style in styles if style in legend.values()] == list(legend.values())


def test_points_can_be_pointed_at() -> None:
    tips = [tip.text for tip in svg_of(curves([0.5, math.nan, 12345.6])).iter("title")]
    assert tips == ["a, step 0: 0.5", "a, step 2: 12,350"]


def test_of_many_points_only_those_without_a_neighbour_are_dots() -> None:
    values = [1.0] * 2000
    values[999] = values[1001] = math.nan
    tips = [tip.text for tip in svg_of(curves(values)).iter("title")]
    assert tips == ["a, step 1,000: 1"]


@pytest.mark.parametrize("figure", [Curves("t", [], {}, "x"), Curves("t", [1], {}, "x"), curves([])])
def test_without_values_it_says_so(figure: Curves) -> None:
    assert "no data" in texts(figure)
    assert "no data" in texts(curves([math.nan]))


def test_one_value_stands_in_the_middle() -> None:
    (((x, _),),) = drawn(curves([3.0], [950]), "k0")
    assert x == (charts.LEFT + charts.RIGHT) / 2
    assert "950" in texts(curves([3.0], [950]))


numbers = st.floats() | st.sampled_from([0.0, 1e308, -1e308, 5e-324, 1e300, 1e-300, -1e-300])


@given(st.lists(st.tuples(numbers, numbers, numbers), max_size=12))
@settings(max_examples=200, deadline=None)
def test_whatever_the_numbers_the_drawing_stays_inside_its_frame(rows: list[tuple[float, ...]]) -> None:
    x, one, other = zip(*rows, strict=True) if rows else ((), (), ())
    svg = svg_of(Curves("t", x, {"one": one, "other": other}, "x", "y"))
    for element in svg.iter():
        geometry = " ".join(value for name, value in element.items() if name in {"x", "y", "d", "cx", "cy"})
        assert not re.search("nan|inf", geometry)
        if element.tag == "circle":
            assert charts.LEFT <= float(element.attrib["cx"]) <= charts.RIGHT
            assert charts.TOP - 0.1 <= float(element.attrib["cy"]) <= charts.BOTTOM + 0.1
    assert len(list(svg.iter("text"))) < 40


def test_a_series_of_another_length_is_refused() -> None:
    with pytest.raises(PluginError, match="curves 'error': series 'a' has 2 values for 3 of x"):
        curves([1.0, 2.0], [1, 2, 3])


# Pictures


def images_in(text: str) -> list[bytes]:
    return [base64.b64decode(found) for found in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]


def test_pictures_stand_in_labelled_rows() -> None:
    rows = {
        "before": [shades(3, 8, 8), shades(4, 4)],
        "after": [shades(1, 8, 8), shades(300, 100)],
        "none": [],
    }
    text = str(Pictures("Digits", rows).draw().svg)
    page = Page(text)
    assert [row[0] for row in page.rows] == ["before", "after", "none"]
    assert [len(row) for row in page.rows] == [3, 3, 1]
    alts = [value for name, value in page.attributes if name == "alt"]
    assert alts == [
        "Digits: before, 1 of 2",
        "Digits: before, 2 of 2",
        "Digits: after, 1 of 2",
        "Digits: after, 2 of 2",
    ]
    expected = [image.view(-1, *image.shape[-2:]) for images in rows.values() for image in images]
    found = [decoded(file) for file in images_in(text)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("height", "width", "shown", "pixels"),
    [(8, 8, (80, 80), True), (16, 8, (80, 40), True), (28, 28, (56, 56), True), (64, 64, (64, 64), False),
     (256, 256, (256, 256), False), (1024, 512, (256, 128), False), (1, 2000, (1, 256), False)],
)  # fmt: skip
def test_small_pictures_are_enlarged_pixel_by_pixel_and_large_ones_shrunk(
    height: int, width: int, shown: tuple[int, int], pixels: bool
) -> None:
    attributes = dict(Page(str(Pictures("t", {"a": [shades(height, width)]}).draw().svg)).attributes)
    assert (int(attributes["height"]), int(attributes["width"])) == shown
    assert (attributes.get("class") == "pixels") == pixels


def test_no_pictures_give_a_page_that_says_so() -> None:
    assert "no data" in str(Pictures("t", {}).draw().svg)


@pytest.mark.parametrize("shape", [(4,), (2, 4, 4), (1, 1, 4, 4), (0, 4), (3, 4, 0)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PluginError, match=re.escape(f"row 'a' has shape {list(shape)}")):
        Pictures("t", {"a": [torch.zeros(shape)]})


# The report


def test_results_stand_right_behind_the_metrics() -> None:
    record = full_record()
    record.figures = [
        curves([1.0, 2.0], note="The smaller the better."),
        Pictures("Digits", {"all": [shades(8, 8)]}),
    ]
    text = render(record)
    page = Page(text)
    assert text.index('id="metrics"') < text.index('id="results"') < text.index('id="error"')
    assert {"Results", "error", "The smaller the better.", "Digits"} <= set(page.words)
    assert "#results" in [value for name, value in page.attributes if name == "href"]
    (policy,) = re.findall('Content-Security-Policy" content="([^"]*)"', text)
    assert policy.split("; ") == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "script-src 'unsafe-inline'",
        "img-src data:",
    ]
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert "figures" not in record.metrics()


def test_hostile_names_are_text() -> None:
    record = full_record()
    before = Page(render(record)).tags
    record.figures = [
        Curves(HOSTILE, [0, 1], {HOSTILE: [1.0, 2.0]}, HOSTILE, HOSTILE, HOSTILE),
        Pictures(HOSTILE, {HOSTILE: [shades(2, 2)]}, HOSTILE),
    ]
    page = Page(render(record))
    counts = [
        page.tags.count(tag) - before.count(tag) for tag in ("script", "svg", "img", "figure", "title")
    ]
    assert counts == [0, 1, 1, 2, 2]
    assert page.words.count(HOSTILE) >= 7  # two titles, two notes, a legend, two axes, a row


class Shown(TinyTask):
    """Shows what the model that was evaluated last makes of a ramp."""

    def evaluate(self, model):
        with torch.no_grad():
            self.ramp = model(torch.linspace(0, 1, 12).view(3, 4)).flatten()
        return {"sum": float(self.ramp.sum())}

    def figures(self):
        return [curves(self.ramp.tolist()), Pictures("Ramp", {"quantized": [self.ramp.view(3, 4)]})]


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4))


def results_of(text: str) -> str:
    start = text.index('<section id="results">')
    return text[start : text.index("</section>", start)]


def test_a_run_asks_for_the_figures_of_the_quantized_model(tmp_path):
    samples = [torch.randn(8, 4)]
    record = run(tmp_path / "one", linear, samples, "round", task=Shown)
    again = run(tmp_path / "two", linear, samples, "round", task=Shown)
    line, pictures = record.figures
    assert sum(line.series["a"]) == pytest.approx(record.after["sum"], rel=1e-5)
    assert record.after != record.before
    section, other = (results_of((tmp_path / name / "report.html").read_text()) for name in ("one", "two"))
    assert section == other
    assert section.count("<figure>") == 2
    assert str(pictures.draw().svg) in section
    assert again.after == record.after


def test_a_task_without_figures_has_no_results(tmp_path):
    run(tmp_path, linear, [torch.randn(8, 4)], "round")
    text = (tmp_path / "report.html").read_text()
    for trace in ('id="results"', "#results", "img-src", ".pictures", "circle:hover"):
        assert trace not in text
