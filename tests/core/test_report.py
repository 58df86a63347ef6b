"""The report: a page that parses, says what the record says, and survives hostile or broken values."""

import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from ptqcore.report import charts
from ptqcore.report.legend import kind_colours
from ptqcore.report.page import change, duration, limits, render, signed, size, sortable
from ptqcore.report.record import BlockRecord, ExportRecord, LayerRecord, RunRecord
from ptqcore.report.table_page import BarChart, TablePage
from ptqcore.report.table_text import Spread, csv_table, markdown_table

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Checks that tags balance, and collects the text, the table rows and the attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.strip()


def layer(path: str, error: float | None = 0.01, **changes: object) -> LayerRecord:
    fields: dict[str, object] = {
        "path": path,
        "block": path.rpartition(".")[0],
        "shape": (8, 16),
        "weights": "int4 per channel",
        "activations": None,
        "relative_error": error,
        "clipped": 0.0025,
        "weight_range": (-0.5, 0.75),
        "input_range": (-3.0, 40.0),
    }
    return LayerRecord(**(fields | changes))  # type: ignore[arg-type]


def full_record() -> RunRecord:
    return RunRecord(
        plugin="llm",
        recipe="w4-gptq",
        description="Four bits.",
        before={"perplexity": 29.6, "agreement": 1.0},
        after={"perplexity": 33.418, "agreement": 0.9132},
        size_bytes={"before": 538_000_000, "after": 134_500_000},
        seconds=412.7,
        peak_memory_bytes=1_512_000_000,
        exports={
            "gguf": ExportRecord("out/model.gguf", True, 0.0),
            "awq": ExportRecord("out/awq", False, 0.03125),
        },
        layers=[layer(f"model.{block}.{kind}") for block in range(3) for kind in ("q", "k")],
        blocks=[BlockRecord(f"model.{block}", 0.02, 61.5, 900_000_000) for block in range(3)],
        exceptions={"model.0.q": "8 bits, as a first or last layer (quant.first_last_bits)"},
        skipped={"lm_head": "tied to the embedding"},
        facts={"calibration tokens": 12_345, "share of padding": 0.123456, "source": "a book"},
        phases={"walk": 300.0, "evaluate": 12.5},
        recipe_yaml="task:\n  kind: causal-lm\n",
        versions={"torch": "2.13.0"},
        seed=1234,
    )


def svg_texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def svg_tooltips(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("title")]


def bar_heights(svg: str) -> list[float]:
    rectangles = ElementTree.fromstring(svg).iter("rect")
    return [float(rect.attrib["height"]) for rect in rectangles if rect.attrib["class"] != "hit"]


def crosses(svg: str) -> int:
    return sum(path.get("class") == "broken" for path in ElementTree.fromstring(svg).iter("path"))


def test_page_has_balanced_tags_and_every_section() -> None:
    headings = " ".join(Page(render(full_record())).words)
    for heading in (
        "Error per layer",
        "Error per block",
        "Weight range",
        "Input range",
        "Clipped weights",
        "Time per block",
        "Peak memory per block",
        "Left in full precision",
        "Versions and seed",
    ):
        assert heading in headings


def test_page_states_each_metric_before_and_after_with_its_change() -> None:
    rows = Page(render(full_record())).rows
    assert ["perplexity", "29.6", "33.42", "+3.818 (+12.9 %)"] in rows
    assert ["agreement", "1", "0.9132", "-0.0868 (-8.68 %)"] in rows


def test_metric_of_one_evaluation_only_is_shown_without_a_change() -> None:
    rows = Page(render(RunRecord("p", "r", before={"old": 2.0}, after={"new": 3.0}))).rows
    assert ["old", "2", "—", ""] in rows
    assert ["new", "—", "3", ""] in rows


def test_page_states_size_time_memory_exports_reasons_and_provenance() -> None:
    page = Page(render(full_record()))
    for figure in ("538 MB → 134.5 MB", "4\N{MULTIPLICATION SIGN} smaller", "6:53", "1.512 GB"):
        assert figure in page.words
    assert ["gguf", "out/model.gguf", "✓ yes", "0"] in page.rows
    assert ["awq", "out/awq", "✗ no", "0.03125"] in page.rows
    assert ["lm_head", "tied to the embedding"] in page.rows
    assert ["model.0.q", "8 bits, as a first or last layer (quant.first_last_bits)"] in page.rows
    assert ["torch", "2.13.0"] in page.rows
    assert ["seed", "1234"] in page.rows
    assert "task:\n  kind: causal-lm\n" in page.words


def test_facts_of_the_task_are_on_the_page_and_among_the_metrics() -> None:
    record = full_record()
    rows = Page(render(record)).rows
    assert ["calibration tokens", "12,345"] in rows
    assert ["share of padding", "0.1235"] in rows
    assert ["source", "a book"] in rows
    assert record.metrics()["facts"] == record.facts
    assert "facts" not in RunRecord("p", "r").metrics()


def test_layer_table_has_one_row_per_layer() -> None:
    row = [
        "model.2.k",
        "8 \N{MULTIPLICATION SIGN} 16",
        "int4 per channel",
        "—",
        "0.01",
        "0.25 %",
        "-0.5 … 0.75",
        "-3 … 40",
    ]
    rows = Page(render(full_record())).rows
    assert row in rows
    assert sum(cells[1:3] == row[1:3] for cells in rows) == 6


def test_page_refers_to_nothing_outside_itself() -> None:
    text = render(full_record())
    assert re.search(r"https?://", text) is None
    assert "@import" not in text
    assert "url(" not in text
    attributes = Page(text).attributes
    assert [name for name, _ in attributes if name in {"src", "srcset", "data", "action"}] == []
    assert all(value.startswith("#") for name, value in attributes if name == "href")


def test_links_within_the_page_have_their_targets() -> None:
    attributes = Page(render(full_record())).attributes
    targets = {value for name, value in attributes if name == "id"}
    assert {value[1:] for name, value in attributes if name == "href"} <= targets


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img onerror=x>', "</title></svg>&amp;"]
)
def test_hostile_names_are_text_wherever_they_appear(hostile: str) -> None:
    safe = Page(render(full_record()))
    record = full_record()
    record.layers = [layer(f"model.{hostile}", block=hostile), *record.layers[1:]]
    record.blocks = [BlockRecord(hostile, 0.1, 1.0, 10), *record.blocks[1:]]
    record.plugin = record.recipe = record.description = record.recipe_yaml = hostile
    record.skipped, record.exceptions, record.facts = (
        {hostile: hostile},
        {hostile: hostile},
        {hostile: hostile},
    )
    record.exports = {hostile: ExportRecord(hostile, True, 0.0), "awq": record.exports["awq"]}
    record.before = {hostile: 1.0, "agreement": 1.0}
    record.after = dict(record.before)
    record.phases, record.versions = {hostile: 1.0, "evaluate": 1.0}, {hostile: hostile}
    page = Page(render(record))
    assert [page.tags.count(tag) for tag in ("script", "img", "svg")] == [1, 0, safe.tags.count("svg")]
    assert [hostile, hostile] in page.rows
    assert hostile in page.words


def test_empty_record_gives_a_page() -> None:
    page = Page(render(RunRecord("llm", "nothing")))
    assert "nothing" in page.words
    assert "No layer was quantized." in page.words
    assert page.tags.count("svg") == 0


def test_layers_without_gram_are_left_out_of_the_charts_that_need_it() -> None:
    record = RunRecord("p", "r", layers=[layer("a.conv", None, input_range=None), layer("a.linear")])
    titles = [word for word in Page(render(record)).words if word.startswith("a.conv: ")]
    assert titles == ["a.conv: -0.5 … 0.75", "a.conv: 0.25 %"]


def test_record_of_broken_numbers_gives_a_page_that_says_so() -> None:
    broken = layer("a.b", math.nan, clipped=math.inf, weight_range=(-math.inf, math.nan))
    record = RunRecord("p", "r", before={"m": 0.0}, after={"m": math.nan}, layers=[broken, layer("a.c")])
    record.seconds = record.phases["walk"] = math.inf
    page = Page(render(record))
    assert ["m", "0", "NaN", "NaN"] in page.rows
    assert "a.b: NaN" in page.words
    assert any("Not finite: 1 of 2." in word for word in page.words)


def test_two_thousand_layers_stay_below_four_megabytes() -> None:
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "router")
    layers = [layer(f"model.layers.{index // 8}.{kinds[index % 8]}") for index in range(2000)]
    text = render(RunRecord("p", "r", layers=layers))
    assert len(text) < 4_000_000
    assert "other kinds" in Page(text).words


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.0],
        [0.0, 0.0],
        [3.0],
        [-2.0, 5.0],
        [math.nan],
        [math.inf, -math.inf, math.nan],
        [1e-9, 1.0, 0.0, math.nan],
        [1e308, 1.0],
        [5e-324],
        [5e-324, 1e-310],
        [1e300, 1e-300],
    ],
)
def test_charts_parse_whatever_the_values(values: Sequence[float]) -> None:
    labels = [f"layer {index}" for index in range(len(values))]
    for svg in (
        charts.bars(labels, values, title="error", unit="%"),
        charts.ranges(labels, [(-abs(value), value) for value in values], title="range"),
        charts.ranges(labels, [(value, value) for value in values], title="range"),
    ):
        root = ElementTree.fromstring(svg)
        assert len(list(root.iter("title"))) == len(values)
        geometry = [
            value
            for element in root.iter()
            for name, value in element.attrib.items()
            if name in {"x", "y", "width", "height", "d"}
        ]
        assert not re.search("nan|inf", " ".join(geometry))
        heights = bar_heights(svg)
        assert all(0 < height <= charts.BOTTOM - charts.TOP for height in heights)


def test_chart_without_values_says_so() -> None:
    assert "no data" in svg_texts(charts.bars([], [], title="error"))


def test_values_without_a_place_on_the_axis_become_crosses_with_their_name() -> None:
    svg = charts.bars(["a", "b", "c"], [math.nan, 2.0, -math.inf], title="error", unit="s")
    assert svg_tooltips(svg) == ["a: NaN s", "b: 2 s", "c: -∞ s"]
    assert crosses(svg) == 2
    assert len(bar_heights(svg)) == 1


def test_linear_bars_are_proportional_to_their_values() -> None:
    svg = charts.bars(["a", "b", "c"], [1.0, 2.0, 4.0], title="error")
    one, two, four = bar_heights(svg)
    assert two == pytest.approx(2 * one, abs=0.02)
    assert four == pytest.approx(4 * one, abs=0.02)
    assert "error" in svg_texts(svg)


def test_values_over_decades_get_a_log_axis_that_says_so() -> None:
    svg = charts.bars(["a", "b", "c", "d"], [1e-4, 1e-3, 1e-1, 0.0], title="error")
    small, middle, large, nothing = bar_heights(svg)
    decade = middle - small
    assert large - middle == pytest.approx(2 * decade, abs=0.02)
    assert nothing == charts.LOWEST_BAR
    texts = svg_texts(svg)
    assert "error (log scale)" in texts
    assert {"0.001", "0.01", "0.1"} <= set(texts)


def test_ranges_over_decades_are_symmetric_about_zero() -> None:
    svg = charts.ranges(["a", "b"], [(-0.1, 0.1), (-1000.0, 1000.0)], title="input")
    assert "input (symmetric log scale)" in svg_texts(svg)
    small, large = [rect for rect in ElementTree.fromstring(svg).iter("rect") if rect.get("class") == "k0"]
    middles = [float(rect.attrib["y"]) + float(rect.attrib["height"]) / 2 for rect in (small, large)]
    assert middles == pytest.approx([(charts.TOP + charts.BOTTOM) / 2] * 2, abs=0.02)
    assert float(small.attrib["height"]) > 5


def test_labels_that_xml_forbids_are_replaced() -> None:
    svg = charts.bars(["a\x00<b>\ud800"], [1.0], title="x & y")
    assert svg_tooltips(svg) == ["a\ufffd<b>\ufffd: 1"]
    assert "x & y" in svg_texts(svg)


def test_names_below_the_axis_never_overlap() -> None:
    labels = [f"block number {index}" for index in range(200)]
    svg = charts.bars(labels, [1.0] * 200, title="error")
    names = [
        text for text in ElementTree.fromstring(svg).iter("text") if text.get("text-anchor") == "middle"
    ]
    assert 2 < len(names) < 20
    places = [float(text.attrib["x"]) for text in names]
    widest = max(len(text.text or "") for text in names) * charts.CHARACTER_WIDTH
    assert min(right - left for left, right in pairwise(places)) >= widest * 0.9


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        charts.bars(["a"], [1.0, 2.0], title="error")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (29.604, "29.6"),
        (33.41789, "33.42"),
        (-0.08683, "-0.08683"),
        (1234.5678, "1,235"),
        (999.96, "1,000"),
        (123456.0, "123,500"),
        (1.23456e-7, "1.235e-7"),
        (2.5e12, "2.5e12"),
        (1e-10, "1e-10"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
    ],
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert charts.number(value) == text


def test_sizes_and_times_are_for_people() -> None:
    assert [size(512_000), size(75_250_000), size(2_500_000_000)] == ["0.512 MB", "75.25 MB", "2.5 GB"]
    assert [duration(12.34), duration(90), duration(90.6), duration(3725)] == [
        "12.34 s",
        "90 s",
        "1:31",
        "1:02:05",
    ]


def test_changes_show_their_sign() -> None:
    assert [signed(2.0), signed(-2.0), signed(0.0)] == ["+2", "-2", "0"]
    assert change(4.0, 5.0) == "+1 (+25 %)"
    assert change(-4.0, -5.0) == "-1 (-25 %)"
    assert change(0.0, 0.5) == "+0.5"
    assert change(None, 0.5) == ""


def test_broken_values_sort_as_the_worst_and_missing_ones_as_the_least() -> None:
    assert [sortable(None), sortable(0.5), sortable(math.nan)] == ["-Infinity", "0.5", "Infinity"]
    assert limits(None) == "—"


# A page for a table


def table_page(**changes: object) -> TablePage:
    fields: dict[str, object] = {
        "eyebrow": "ptq-llm",
        "title": "bench",
        "lead": "Two recipes.",
        "columns": ["recipe", "perplexity", "seconds", "reason"],
        "rows": [
            {"recipe": "w4", "perplexity": 30.5, "seconds": 12346.0},
            {"recipe": "w3", "perplexity": math.nan},
            {"recipe": "w2", "reason": "out of memory"},
        ],
        "notes": ["Lower is better."],
        "charts": [
            BarChart(
                "Perplexity", "perplexity", ["w4 a", "w3 a", "w4 b"], [30, 31, 9], list("xyx"), list("aab")
            )
        ],
    }
    return TablePage(**(fields | changes))  # type: ignore[arg-type]


def test_table_page_has_a_row_of_text_and_numbers_for_each_row() -> None:
    page = Page(table_page().render())
    assert page.rows == [
        ["recipe", "perplexity", "seconds", "reason"],
        ["w4", "30.5", "12,350", "—"],
        ["w3", "NaN", "—", "—"],
        ["w2", "—", "—", "out of memory"],
    ]
    assert {"ptq-llm", "bench", "Two recipes.", "Lower is better.", "Perplexity"} <= set(page.words)
    sorted_by = [value for name, value in page.attributes if name == "data-value"]
    assert sorted_by == ["30.5", "12346.0", "Infinity", "-Infinity", "-Infinity", "-Infinity"]


def test_means_with_their_spreads_are_sorted_by_the_mean() -> None:
    cells = [Spread(0.00123456, 0.0000456), Spread(12.0), None]
    page = Page(table_page(columns=["error"], rows=[{"error": cell} for cell in cells]).render())
    assert page.rows == [["error"], ["0.001235 ± 4.6e-5"], ["12"], ["—"]]
    sorted_by = [value for name, value in page.attributes if name == "data-value"]
    assert sorted_by == ["0.00123456", "12.0", "-Infinity"]


def test_a_table_as_markdown() -> None:
    rows = [{"name": "a|b", "error": 1 / 3, "mean": Spread(2.0, 0.5)}, {"name": "c"}]
    assert markdown_table(["name", "error", "mean"], rows, ["Less is better."]).splitlines() == [
        "| name | error | mean |",
        "| --- | --: | --: |",
        r"| a\|b | 0.33333 | 2 ± 0.5 |",
        "| c |  |  |",
        "",
        "- Less is better.",
    ]


def test_a_table_as_csv_has_all_digits() -> None:
    rows = [{"name": "a,b", "error": 1 / 3}, {"name": "c", "error": None}]
    assert csv_table(["name", "error"], rows) == f'name,error\n"a,b",{1 / 3!r}\nc,\n'


def test_table_page_needs_nothing_but_itself() -> None:
    text = table_page().render()
    assert re.search(r"https?://|@import|url\(", text) is None
    assert [name for name, _ in Page(text).attributes if name in {"src", "srcset", "href"}] == []


def test_table_page_without_rows_or_charts_is_a_page() -> None:
    page = Page(table_page(rows=[], charts=[], lead="").render())
    assert page.rows == [["recipe", "perplexity", "seconds", "reason"]]
    assert page.tags.count("svg") == 0


def test_names_in_a_table_are_text() -> None:
    hostile = "<script>alert(1)</script>"
    chart = BarChart(hostile, hostile, [hostile], [1.0], [hostile], [hostile], hostile)
    page = Page(
        table_page(
            eyebrow=hostile,
            title=hostile,
            lead=hostile,
            columns=[hostile],
            rows=[{hostile: hostile}],
            notes=[hostile],
            charts=[chart],
        ).render()
    )
    assert page.tags.count("script") == 1
    assert page.rows == [[hostile], [hostile]]


def test_bars_of_a_kind_share_a_colour_and_neighbours_of_a_group_its_name() -> None:
    chart = table_page().charts[0].draw()
    assert chart.legend == {"x": "k0", "y": "k1"}
    bars = [rect for rect in ElementTree.fromstring(chart.svg).iter("rect") if rect.get("class") != "hit"]
    assert [bar.get("class") for bar in bars] == ["k0", "k1", "k0"]
    assert [text for text in svg_texts(chart.svg) if text in "ab"] == ["a", "b"]
    assert svg_tooltips(chart.svg) == ["w4 a: 30", "w3 a: 31", "w4 b: 9"]


def test_kinds_beyond_the_palette_share_a_colour() -> None:
    colours = kind_colours([str(index) for index in range(9)])
    assert list(colours.values()) == ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "other", "other"]
