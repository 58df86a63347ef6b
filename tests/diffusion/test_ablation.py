"""The ablation: every figure is that of an ordinary run, nothing is done twice, all of it in one table."""

import csv
import json
import math
from dataclasses import replace
from functools import partial
from io import StringIO
from types import SimpleNamespace

import pytest
import tiny_pipelines as tiny
from diffusers import DDIMPipeline, DDIMScheduler

import ptqcore
from ptq_diffusion import ablation, tiar
from ptq_diffusion.ablation import Ablation, make_runs, run
from ptq_diffusion.ablation_table import METRICS, Row, Variant, to_csv, to_html, to_markdown
from ptqcore import find_recipe
from ptqcore.recipe import Entry

SMALL = ("task.calibration_samples=4", "task.calibration_keep=2", "quant.activations.observer=minmax")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What is compared; its pipeline must not be changed."""
    folder = tmp_path_factory.mktemp("ablation")
    DDIMPipeline(tiny.unet(), DDIMScheduler()).save_pretrained(folder / "tiny")
    return Ablation(
        pipelines=[str(folder / "tiny")],
        weights=[4],
        activations=[6],
        seeds=[0, 1],
        samples=2,
        steps=3,
        layers="temporal",
        scope="temporal",
        cache=False,
        rest="round",
        overrides=SMALL,
        output=folder / "out",
    )


@pytest.fixture(scope="module")
def finished(base):
    """The rows of a finished ablation with one seed, which is only read; TIAR is cut short in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiar, "Schedule", lambda _, *rest: ptqcore.Schedule(200, *rest))
        return run(replace(base, seeds=[0]), False)


class Fake:
    """In the place of runs, which take seconds: counts them, and gives each figures of its own."""

    def __init__(self):
        self.names: list[str] = []
        self.interrupt_at = 0

    def quantize(self, recipe, plugin, folder, resume):
        self.names.append(f"{recipe.name} {recipe.seed}")
        if len(self.names) == self.interrupt_at:
            raise KeyboardInterrupt
        after = dict.fromkeys(METRICS, len(recipe.steps) + recipe.seed / 4)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps({"after": after}))
        (folder / "manifest.json").write_text("{}")
        return SimpleNamespace(after=after)


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    monkeypatch.setattr(ablation, "quantize", fake.quantize)
    return fake


# What is run


def test_all_combinations_are_run_with_every_seed(base):
    more = replace(base, weights=[3, 4], activations=[8, 6], cache=True)
    runs = make_runs(more)
    assert [(one.variant.bits, one.variant.switches, one.seed) for one in runs] == [
        (bits, f"TIAR {learned}, FSC {fsc}", seed)
        for bits in ("W3A8", "W3A6", "W4A8", "W4A6")
        for learned in ("off", "on", "cache")
        for fsc in ("off", "on")
        for seed in (0, 1)
    ]
    assert len({one.folder for one in runs}) == len(runs)


def steps_of(recipe):
    """Name, and scope or mode, of every step."""
    return [(step.name, step.options.get("scope") or step.options.get("mode")) for step in recipe.steps]


def test_the_recipes_differ_in_their_steps_widths_and_seeds(base):
    runs = make_runs(replace(base, cache=True, scope="all", layers="all", rest="brecq", weights=[3]))
    fsc, learned, tables = ("finite-set-calibration", "all"), ("tiar", "reconstruct"), ("tiar", "cache")
    assert [steps_of(one.recipe)[:-1] for one in runs[::2]] == [
        *([], [fsc], [learned], [fsc, learned], [tables], [fsc, tables])
    ]
    assert {steps_of(one.recipe)[-1] for one in runs} == {("brecq", None)}
    quants = {json.dumps(one.recipe.quant.model_dump(mode="json")) for one in runs}
    assert len(quants) == 1
    quant = runs[0].recipe.quant
    assert (quant.weights.bits, quant.activations.bits, quant.first_last_bits) == (3, 6, 8)
    assert quant.activations.observer == Entry(name="minmax")
    assert make_runs(base)[0].recipe.quant.first_last_bits is None


def test_every_seed_has_images_of_its_own(base):
    first, second = make_runs(base)[:2]
    assert (first.recipe.seed, second.recipe.seed) == (0, 1)
    assert second.recipe.task.model_dump()["seeds"] == first.recipe.task.model_dump()["seeds"] + 2


def test_figures_are_those_of_ordinary_runs(base, finished, tmp_path):
    steps = "steps=[finite-set-calibration, round]"
    changes = [*SMALL, steps, "export=[]", "task.layers=temporal", "task.steps=3", "task.samples=2"]
    changes += ["quant.activations.bits=6", "quant.first_last_bits=null"]
    changes += [f"task.pipeline={base.pipelines[0]}"]
    record = ptqcore.quantize(find_recipe("w4a8", "diffusion", changes), "diffusion", tmp_path / "out")
    (row,) = [row for row in finished if row.variant.switches == "TIAR off, FSC on"]
    assert row.runs == [record.after]


def test_tiar_brings_temporal_features_back(finished):
    errors = {row.variant.switches: row.over("temporal_error").mean for row in finished}
    assert list(errors) == [
        *("TIAR off, FSC off", "TIAR off, FSC on", "TIAR on, FSC off", "TIAR on, FSC on")
    ]
    assert errors["TIAR on, FSC off"] < errors["TIAR off, FSC off"]
    assert errors["TIAR on, FSC on"] < errors["TIAR off, FSC on"]


def test_tables_are_exact(base, finished):
    rows = run(replace(base, cache=True, seeds=[0]), True)
    assert [row for row in rows if row.variant.tiar != "cache"] == finished
    errors = [row.over("temporal_error").mean for row in rows if row.variant.tiar == "cache"]
    assert len(errors) == 2
    assert max(errors) <= 1e-6


# Resuming


def test_nothing_is_done_twice(base, finished, fake):
    assert run(replace(base, seeds=[0]), True) == finished
    assert fake.names == []


def test_an_interrupted_ablation_goes_on(base, fake, tmp_path):
    own, fake.interrupt_at = replace(base, output=tmp_path), 4
    with pytest.raises(KeyboardInterrupt):
        run(own, False)
    lines = list(csv.DictReader((tmp_path / "ablation.csv").read_text().splitlines()))
    assert [(line["TIAR"], line["FSC"], line["runs"]) for line in lines] == [
        ("off", "off", "2"),
        ("off", "on", "1"),
    ]
    rows = run(own, True)
    assert fake.names[3] == fake.names[4] == "w4a6-tiar-off-fsc-on 1"
    assert len(fake.names) == 8 + 1
    assert [[one["image_error"] for one in row.runs] for row in rows] == [
        [1, 1.25],
        [2, 2.25],
        [2, 2.25],
        [3, 3.25],
    ]


def test_without_resuming_everything_is_done_again(base, fake, tmp_path):
    own = replace(base, output=tmp_path)
    assert run(own, False) == run(own, False)
    assert len(fake.names) == 16


def test_folders_tell_what_decides_the_figures(base, tmp_path):
    def folders(**changes):
        return [one.folder.name for one in make_runs(replace(base, **changes))]

    before, text = folders(), tmp_path / "words.txt"
    assert folders() == before
    text.write_text("a cat\n")
    for changes in ({"samples": 3}, {"overrides": (*SMALL, f"task.prompts={text}")}):
        assert not {*folders(**changes)} & {*before}
    words = folders(overrides=(*SMALL, f"task.prompts={text}"))
    text.write_text("a dog\n")
    assert not {*folders(overrides=(*SMALL, f"task.prompts={text}"))} & {*words}
    DDIMPipeline(tiny.unet(), DDIMScheduler()).save_pretrained(tmp_path / "tiny")
    assert folders(pipelines=[str(tmp_path / "tiny")]) == before
    DDIMPipeline(tiny.unet(), DDIMScheduler(beta_end=0.03)).save_pretrained(tmp_path / "tiny")
    assert not {*folders(pipelines=[str(tmp_path / "tiny")])} & {*before}


# The tables


def row(*errors, **changes):
    fields = {"pipeline": "p", "weights": 4, "activations": 8, "tiar": "on", "fsc": True}
    return Row(Variant(**fields | changes), [dict.fromkeys(METRICS, error) for error in errors])


def test_means_and_standard_deviations_over_the_seeds():
    lines = to_markdown([row(0.001, 0.003), row(2.0, tiar="cache", fsc=False)], ["A note."]).splitlines()
    assert lines[0] == (
        "| pipeline | bits | TIAR | FSC | temporal error | temporal mismatch | teacher forced error "
        "| trajectory error | image error | image PSNR | Fréchet distance |"
    )
    assert lines[2] == f"| p | W4A8 | on | on |{' 0.002 ± 0.0014 |' * 7}"
    assert lines[3] == f"| p | W4A8 | cache | off |{' 2 |' * 7}"
    assert lines[5] == "- A note."


def test_the_csv_table_has_every_digit():
    (line, single) = csv.DictReader(StringIO(to_csv([row(0.1, 0.2, 0.6), row(1 / 3)])))
    assert line["runs"] == "3"
    assert float(line["image_error_mean"]) == pytest.approx(0.3)
    assert float(line["image_error_spread"]) == pytest.approx(math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2))
    assert float(single["image_psnr_mean"]) == 1 / 3
    assert single["image_psnr_spread"] == ""


def test_all_tables_are_written_with_notes_on_what_they_mean(base, fake, tmp_path):
    rows = run(replace(base, output=tmp_path), False)
    texts = {kind: (tmp_path / f"ablation.{kind}").read_text() for kind in ("md", "csv", "html")}
    for text in (texts["md"], texts["html"]):
        assert "The temporal block alone is quantized" in text
        assert "2 images in 3 steps" in text
        assert "standard deviations of the sample over the seeds 0, 1" in text
        assert "Ranges of a small denoiser move little over time" in text
    assert texts["csv"] == to_csv(rows)
    assert "<title>ablation · ptq-diffusion</title>" in to_html(rows, [])


# The command


@pytest.fixture
def ptq(ptq):
    """Run `ptq diffusion ablation`."""
    return partial(ptq, "diffusion", "ablation")


def arguments(base, output):
    sets = [f"--set={change}" for change in SMALL]
    sizes = ["--activations", "6", "--samples=2", "--steps=3", "--seeds", "0"]
    return ["--pipeline", base.pipelines[0], *sizes, *sets, "--output", str(output)]


def test_the_command_prints_the_table(base, finished, ptq):
    code, out, _ = ptq(*arguments(base, base.output), "--resume")
    assert code == 0
    assert out.startswith(to_markdown(finished, []))
    assert f"table: {base.output / 'ablation.md'}, ablation.csv and ablation.html" in out


def test_an_interruption_says_how_to_go_on(base, ptq, fake, tmp_path):
    fake.interrupt_at = 2
    code, _, err = ptq(*arguments(base, tmp_path))
    assert code == 130
    assert err.splitlines()[-1] == "interrupted; run the same command with --resume to go on"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seeds", "0,a"], "--seeds '0,a': give whole numbers with commas between, as 4,8"),
        (["--seeds", "0,0"], "--seeds is [0, 0]: give at least one value, and none twice"),
        (["--seeds", "-1"], "recipe key 'seed' is -1: "),
        (["--weights", "4,"], "--weights '4,': give whole numbers"),
        (["--activations", "1"], "recipe key 'quant.activations"),
        (["--layers", "some"], "recipe key 'task.layers' is 'some': "),
        (["--scope", "some"], "finite-set-calibration"),
        (["--rest", "rond"], "'rond' is unknown; did you mean 'round'?"),
        (["--set", "task.steps=3"], "--set task.steps: the ablation sets it itself, use --steps"),
        (["--set", "task.prompts=/no/such"], "the prompts '/no/such' cannot be read: No such file"),
        (["--pipeline", "/no/such"], "task.pipeline '/no/such' is not a folder: give one that"),
    ],
)
def test_what_is_wrong_is_one_sentence(ptq, tmp_path, options, sentence):
    code, _, err = ptq(*options, "--output", str(tmp_path / "out"))
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert not (tmp_path / "out").exists()
