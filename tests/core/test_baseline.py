"""The naive baseline: the same model rounded to nearest, measured in the run, that changes nothing else."""

import gc
import json
import weakref

import pytest
import torch
from test_report import Page, full_record
from tiny_task import W3, W3A4, TinyTask, manifest_of, run, weights_of
from torch import nn

from ptqcore import DataError, ModelError, QuantModule, RecipeError
from ptqcore.learned_rounding import BRECQ
from ptqcore.plan import recipe_schema
from ptqcore.plugin import discover
from ptqcore.recipe import Recipe, validate
from ptqcore.report.page import render
from ptqcore.restoring import restored
from ptqcore.rounding import Round
from ptqcore.summary import summarize

BASELINE = {"evaluate": {"baseline": True}}
SAMPLES = [torch.randn(16, 6, generator=torch.Generator().manual_seed(1)) for _ in range(3)]
PATHS = ["0", "2", "4"]


def make() -> nn.Module:
    """Three linear layers, each a block of its own."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 4)]
    return nn.Sequential(*layers)


class Noting(TinyTask):
    """Notes what it is asked, and draws random numbers that are nobody's."""

    seen: list = []  # noqa: RUF012
    living: list = []  # noqa: RUF012

    def evaluate(self, model):
        layers = [layer for layer in model.modules() if isinstance(layer, QuantModule)]
        Noting.seen.append((self.judged, len(layers)))
        if self.judged == "naive baseline":
            Noting.living = [weakref.ref(layer) for layer in layers]
        torch.rand(3)
        return super().evaluate(model)

    def figures(self):
        Noting.seen.append("figures")
        return []


class Learning(BRECQ):
    """Notes its blocks and how much of the baseline is still there, and fails at one of them."""

    name = "learning"
    done: list = []  # noqa: RUF012
    fails_at = None

    def block(self, block, calibration):
        if block.path == Learning.fails_at:
            raise KeyboardInterrupt
        Learning.done.append(block.path)
        assert not [one for one in Noting.living if one() is not None]
        super().block(block, calibration)


class Noise(Round):
    """Adds random numbers of the run's own generator to the biases."""

    name = "noise"

    def block(self, block, calibration):
        with torch.no_grad():
            for layer in block.layers().values():
                layer.bias.add_(torch.randn_like(layer.bias))
        super().block(block, calibration)


STEPS = {"learning": f"{__name__}:Learning", "noise": f"{__name__}:Noise"}
ENTRY = {"learning": {"iterations": 3}}


@pytest.fixture(autouse=True)
def _afresh():
    Noting.seen.clear()
    Noting.living = []
    Learning.done.clear()
    Learning.fails_at = None


def learned(folder, quant=W3, resume=False, **keys):
    return run(folder, make, SAMPLES, ENTRY, quant, resume, STEPS, Noting, **keys)


@pytest.mark.parametrize("quant", [W3, W3A4, W3 | {"activations": {"bits": 4}}], ids=["w", "dataflow", "a"])
def test_the_baseline_is_the_model_rounded_to_nearest_and_the_result_is_as_without(tmp_path, quant):
    record = learned(tmp_path / "with", quant, **BASELINE)
    without = learned(tmp_path / "without", quant)
    rounded = run(tmp_path / "rounded", make, SAMPLES, "round", quant)
    assert record.baseline == rounded.after
    assert record.after == without.after != record.baseline
    assert record.before == without.before
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")
    assert manifest_of(tmp_path / "with") == manifest_of(tmp_path / "without")
    assert [block.relative_error for block in record.blocks] == [
        block.relative_error for block in without.blocks
    ]
    assert len(record.layers) == 3


def test_random_numbers_drawn_for_the_baseline_change_nothing(tmp_path):
    for name, keys in {"with": BASELINE, "without": {}}.items():
        run(tmp_path / name, make, SAMPLES, "noise", steps=STEPS, task=Noting, **keys)
    assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without")


def test_metrics_stand_in_the_order_of_the_models(tmp_path):
    record = learned(tmp_path / "with", **BASELINE)
    found = json.loads((tmp_path / "with/metrics.json").read_text())
    assert list(found)[2:5] == ["before", "baseline", "after"]
    assert found["baseline"] == record.baseline
    learned(tmp_path / "without")
    assert "baseline" not in json.loads((tmp_path / "without/metrics.json").read_text())
    assert not (tmp_path / "with/.work").exists()


def test_a_task_knows_which_model_it_judges(tmp_path):
    learned(tmp_path / "with", **BASELINE)
    assert Noting.seen == [("full precision", 0), ("naive baseline", 3), ("quantized", 3), "figures"]
    Noting.seen.clear()
    learned(tmp_path / "without")
    assert Noting.seen == [("full precision", 0), ("quantized", 3), "figures"]


def test_the_modules_of_the_baseline_are_gone_when_the_run_goes_on(tmp_path):
    learned(tmp_path, **BASELINE)
    assert len(Noting.living) == 3
    assert Learning.done == PATHS


# The report


def test_the_report_has_a_column_for_it(tmp_path):
    record = full_record()
    record.baseline = {"perplexity": 40.25}
    page = Page(render(record))
    assert ["metric", "before", "naive baseline", "after", "change"] in page.rows
    assert ["perplexity", "29.6", "40.25", "33.42", "+3.818 (+12.9 %)"] in page.rows
    assert ["agreement", "1", "—", "0.9132", "-0.0868 (-8.68 %)"] in page.rows
    assert "naive" not in render(full_record()).lower()


def test_the_page_and_the_summary_of_a_run_show_it(tmp_path):
    record = learned(tmp_path, **BASELINE)
    page = Page((tmp_path / "report.html").read_text())
    (row,) = (row for row in page.rows if row and row[0] == "sum")
    assert len(row) == 5
    assert float(row[2].replace(",", "")) == pytest.approx(record.baseline["sum"], rel=1e-3)
    before, baseline, after = (
        f"{each['sum']:.5g}" for each in (record.before, record.baseline, record.after)
    )
    assert f"{before} -> {after} (naive baseline {baseline})" in summarize(record, tmp_path)
    record.baseline = {}
    assert "naive" not in summarize(record, tmp_path)


# Resuming


class Rounds:
    """Notes the blocks that `round` rounds, and fails at one of them."""

    def __init__(self, monkeypatch):
        self.done, self.fails_at = [], None
        original = Round.block

        def block(step, block, calibration):
            if block.path == self.fails_at:
                raise KeyboardInterrupt
            self.done.append(block.path)
            original(step, block, calibration)

        monkeypatch.setattr(Round, "block", block)


@pytest.mark.parametrize("quant", [W3, W3A4], ids=["w", "dataflow"])
@pytest.mark.parametrize("fails_at", PATHS)
@pytest.mark.parametrize("where", ["baseline", "run"])
def test_an_interrupted_run_keeps_what_is_finished_and_gives_the_same_bytes(
    tmp_path, monkeypatch, quant, fails_at, where
):
    whole = learned(tmp_path / "whole", quant, **BASELINE)
    rounds = Rounds(monkeypatch)
    (rounds if where == "baseline" else Learning).fails_at = fails_at
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "resumed", quant, **BASELINE)
    rounds.fails_at = Learning.fails_at = None
    rounds.done.clear()
    Learning.done.clear()
    record = learned(tmp_path / "resumed", quant, resume=True, **BASELINE)
    left = PATHS[PATHS.index(fails_at) :]
    assert (rounds.done, Learning.done) == ((left, PATHS) if where == "baseline" else ([], left))
    assert record.baseline == whole.baseline
    assert record.after == whole.after
    assert weights_of(tmp_path / "resumed") == weights_of(tmp_path / "whole")
    assert manifest_of(tmp_path / "resumed") == manifest_of(tmp_path / "whole")


# What cannot be


class Refusing(TinyTask):
    """Cannot judge what is rounded to nearest."""

    def evaluate(self, model):
        if self.judged == "naive baseline":
            raise DataError("no text is left")
        return super().evaluate(model)


def test_a_baseline_that_cannot_be_made_is_one_sentence(tmp_path):
    with pytest.raises(ModelError) as caught:
        run(tmp_path, make, SAMPLES, "adaround", task=Refusing, **BASELINE)
    assert str(caught.value) == (
        "the naive baseline cannot be made: no text is left; to go without it, set evaluate.baseline to "
        "false"
    )
    assert run(tmp_path, make, SAMPLES, "round", task=Refusing).after


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"basline": True}, "'evaluate.basline' is unknown; did you mean 'baseline'"),
        ({"baseline": "often"}, "'evaluate.baseline' is 'often'"),
    ],
)
def test_a_wrong_key_or_value_is_refused(section, message):
    data = {"name": "x", "task": {"kind": "tiny"}, "quant": W3, "steps": ["round"], "evaluate": section}
    with pytest.raises(RecipeError, match=message):
        validate(Recipe, data)


def test_the_schema_of_recipes_knows_it():
    schema = recipe_schema(discover())
    assert schema["properties"]["evaluate"]["$ref"] == "#/$defs/EvaluateSection"
    assert schema["$defs"]["EvaluateSection"]["properties"]["baseline"]["type"] == "boolean"


# A model that is changed for a while


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("buffer", torch.ones(3))
        self.handle = self.register_forward_hook(lambda module, args, output: output + 1)

    def forward(self, x):
        return self.inner(x) * self.buffer


class Doubled(Holder):
    def forward(self, x):
        return 2 * super().forward(x)


def change(model: Holder) -> None:
    """Everything that may be done to a model in place."""
    model.inner = nn.Linear(3, 3)
    model.buffer = torch.zeros(3)
    model.add_module("more", nn.ReLU())
    model.register_forward_hook(lambda module, args, output: output * 7)
    model.handle.remove()
    model.__class__ = Doubled


def test_a_restored_model_is_what_it_was():
    model = Holder()
    inner, names, x = model.inner, set(vars(model)), torch.randn(2, 3)
    with torch.no_grad():
        expected = model(x)
        with restored(model):
            change(model)
            assert not torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
        assert type(model) is Holder
        assert model.inner is inner
        assert set(vars(model)) == names
        model.handle.remove()
        torch.testing.assert_close(model(x), expected - 1)


def test_a_model_is_restored_after_an_error_too():
    model = Holder()
    inner = model.inner
    with pytest.raises(AttributeError), restored(model):
        change(model).nothing  # noqa: B018
    assert model.inner is inner


def test_parameters_that_are_replaced_in_modules_that_stay_are_restored():
    model = Holder()
    weight = model.inner.weight
    with restored(model):
        model.inner.load_state_dict(nn.Linear(3, 3).state_dict(), assign=True)
        assert model.inner.weight is not weight
    assert model.inner.weight is weight


def test_a_model_whose_own_tensors_were_written_into_is_refused():
    model = Holder()
    with pytest.raises(ModelError, match="written into"), torch.no_grad(), restored(model):
        model.inner.weight.add_(1)


def test_nothing_of_a_restored_model_is_kept():
    model = Holder()
    with restored(model):
        model.inner = nn.Linear(3, 3)
        changed = weakref.ref(model.inner)
    gc.collect()
    assert changed() is None
