"""How a quantized denoiser is judged: figures in closed form, and what a run shows of them."""

import json
from statistics import median

import pytest
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import ptqcore
from ptq_diffusion.figures import MOST_RANGES, image_rows, range_curves, temporal_curves, trajectory_curves
from ptq_diffusion.judge import mismatch, relative_error, temporal_error, temporal_errors
from ptq_diffusion.pipelines import load
from ptq_diffusion.sampling import SamplingOptions
from ptq_diffusion.teacher_forcing import Teacher
from ptqcore import Curves, FakeQuant, Pictures, QuantLinear, QuantSpec, Recipe, Timesteps
from ptqcore.recipe import validate

STEPS = 6
SCHEDULE = [0, 166, 332, 498, 664, 830]


def table(*rows: list[float]) -> dict[str, Tensor]:
    return {"a": torch.tensor(rows)}


# Temporal features


def test_features_as_they_were_have_no_error() -> None:
    features = {path: torch.randn(7, 5) for path in ("a", "b")}
    copies = {path: one.clone() for path, one in features.items()}
    assert temporal_error(copies, features) == pytest.approx(0, abs=1e-15)
    assert mismatch(copies, features) == 0


def test_without_features_there_is_no_error() -> None:
    assert temporal_error({}, {}) == mismatch({}, {}) == 0


def test_the_error_is_one_minus_the_cosine() -> None:
    expected = table([1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [3.0, 4.0])
    found = table([0.0, 2.0], [-5.0, 0.0], [1.0, 1.0], [4.0, 3.0])
    errors = [1, 2, 1 - 0.5**0.5, 1 - 24 / 25]
    assert temporal_errors(found, expected)["a"].tolist() == pytest.approx(errors, abs=1e-9)
    assert temporal_error(found, expected) == pytest.approx(sum(errors) / 4)


def test_the_error_is_the_mean_over_features_and_timesteps_of_any_width() -> None:
    expected = {"a": torch.tensor([[1.0, 0.0]] * 3), "b": torch.ones(1, 2, 4)}
    found = {"a": torch.tensor([[0.0, 1.0]] * 3), "b": torch.ones(1, 2, 4)}
    assert temporal_error(found, expected) == pytest.approx(3 / 4)


@given(st.floats(1e-3, 1e3))
def test_the_size_of_a_feature_does_not_matter(size: float) -> None:
    torch.manual_seed(0)
    expected, found = {"a": torch.randn(4, 8)}, {"a": torch.randn(4, 8)}
    scaled = {"a": found["a"].double() * size}
    assert temporal_error(scaled, expected) == pytest.approx(temporal_error(found, expected))
    assert mismatch(scaled, expected) == mismatch(found, expected)


def test_features_of_other_timesteps_are_mismatched() -> None:
    expected = {"a": torch.eye(5), "b": torch.eye(5)[:, :3].repeat(1, 2) + torch.eye(5, 6)}
    shifted = {path: features.roll(1, 0) for path, features in expected.items()}
    assert mismatch(shifted, expected) == 1
    assert temporal_error({"a": shifted["a"]}, {"a": expected["a"]}) == 1
    swapped = expected | {"a": torch.eye(5)[[1, 0, 2, 3, 4]]}
    assert mismatch(swapped, expected) == 2 / 10


# Trajectories


def test_the_relative_error_is_that_of_squares() -> None:
    x = torch.randn(3, 1, 4, 4)
    assert relative_error(x, x) == 0
    assert relative_error(torch.zeros_like(x), x) == 1
    assert relative_error(1.5 * x, x) == pytest.approx(0.25)
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])) == pytest.approx(10 / 25)


def test_predictions_are_compared_for_states_of_full_precision(tmp_path) -> None:
    """Twice the prediction of every state: an error of 1 in every step, however far states went by then."""
    DDIMPipeline(tiny_pipelines.unet(), DDIMScheduler()).save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    options = SamplingOptions(steps=STEPS, batch=2)
    teacher = Teacher(loaded, options, [0, 1])
    assert teacher.errors(loaded.denoiser) == [0.0] * STEPS
    loaded.denoiser.conv_out.weight.data.mul_(2)
    loaded.denoiser.conv_out.bias.data.mul_(2)
    assert teacher.errors(loaded.denoiser) == pytest.approx([1.0] * STEPS)


# Figures


def test_the_trajectories_are_shown_step_by_step() -> None:
    shown = trajectory_curves({"naive baseline": [0.5, 0.25], "quantized": [0.25, 0.125]})
    assert list(shown.x) == [1, 2]
    assert shown.series == {"naive baseline": [0.5, 0.25], "quantized": [0.25, 0.125]}


def test_the_temporal_error_is_shown_as_mean_and_worst_of_each_timestep() -> None:
    naive = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([2.0, 0.5])}
    errors = {"a": torch.tensor([0.25, 0.0]), "b": torch.tensor([0.75, 1.0])}
    shown = temporal_curves({"naive baseline": naive, "quantized": errors}, torch.tensor([1.0, 41.5]))
    assert shown.x == [1.0, 41.5]
    assert shown.series == {
        "naive baseline: mean": [1.5, 0.75],
        "quantized: mean": [0.5, 0.5],
        "naive baseline: worst": [2.0, 1.0],
        "quantized: worst": [0.75, 1.0],
    }
    assert [name.rpartition(" ")[2] for name in shown.series] == ["mean", "mean", "worst", "worst"]
    assert "of 2 temporal features" in shown.note
    assert shown.note.endswith("Worst of the quantized model: b at timestep 41.5.")


def with_ranges(widths: list[list[float]]) -> nn.Sequential:
    """Linear layers whose inputs have ranges of these widths at timesteps 0, 1, …; none, if empty."""
    layers = []
    for each in widths:
        kind = {"granularity": "timestep", "timesteps": len(each)} if each else {}
        layer = QuantLinear(nn.Linear(2, 2), QuantSpec(), QuantSpec(symmetric=False, **kind))
        assert isinstance(layer.input_quantizer, FakeQuant)
        if each:
            layer.input_quantizer.set_range(torch.zeros(len(each)), torch.tensor(each))
        layers.append(layer)
    model = nn.Sequential(*layers)
    count = max(map(len, widths))
    if count:
        model.add_module("timesteps", Timesteps.of(list(range(count)), "input"))
    return model


def test_ranges_are_shown_of_the_layers_where_they_change_most() -> None:
    model = with_ranges([[1.0, 2.0], [], [1.0, 8.0], [4.0, 1.0], [1.0, 8.0], [1.0, 9.0]])
    shown = range_curves(model, ["0", "1", "2", "3", "4"])
    assert shown is not None
    assert shown.x == [0, 1]
    assert list(shown.series) == ["2 and 1 more", "3", "0"]
    assert [pytest.approx(each) for each in shown.series.values()] == [(1, 8), (4, 1), (1, 2)]
    many = range_curves(with_ranges([[1.0, float(2 + index)] for index in range(9)]), list("012345678"))
    assert many is not None
    assert list(many.series) == list("876543")
    assert f"Of 9 tensors the {MOST_RANGES} that" in many.note


def test_without_a_range_for_each_timestep_none_are_shown() -> None:
    assert range_curves(with_ranges([[], []]), ["0", "1"]) is None
    assert range_curves(nn.Sequential(nn.Linear(2, 2)), ["0"]) is None


def test_the_first_images_are_shown() -> None:
    images = torch.rand(12, 3, 4, 4)
    shown = image_rows({"one": images, "other": images[:2]})
    assert [len(row) for row in shown.rows.values()] == [10, 2]
    assert torch.equal(torch.stack(list(shown.rows["one"])), images[:10])


# A whole run


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Runs on a tiny denoiser of random weights: `quantized(*steps, baseline=…)`, a record and the page."""
    pipeline = tmp_path_factory.mktemp("pipeline")
    DDIMPipeline(tiny_pipelines.unet(), DDIMScheduler()).save_pretrained(pipeline)
    small = {"steps": STEPS, "calibration_samples": 8, "calibration_keep": 4, "samples": 4, "batch": 8}
    done = {}

    def run(*steps, baseline=False):
        if (steps, baseline) not in done:
            data = {
                "name": "x",
                "task": {"kind": "denoising", "pipeline": str(pipeline), **small},
                "quant": {
                    "weights": {"bits": 4, "symmetric": False, "granularity": "channel"},
                    "activations": {"bits": 8, "symmetric": False},
                },
                "steps": list(steps),
                "evaluate": {"baseline": baseline},
            }
            folder = tmp_path_factory.mktemp("run")
            record = ptqcore.quantize(validate(Recipe, data), "diffusion", folder)
            done[steps, baseline] = record, (folder / "report.html").read_text(encoding="utf-8"), folder
        return done[steps, baseline]

    return run


FSC = "finite-set-calibration"


def test_the_figures_of_a_run_are_of_the_quantized_denoiser(quantized):
    record, _, _ = quantized(FSC, "round")
    images, trajectory, predictions, temporal, ranges = record.figures
    assert isinstance(images, Pictures)
    assert list(images.rows) == ["full precision", "quantized"]
    before, after = (torch.stack(list(row)) for row in images.rows.values())
    assert float((before - after).square().mean()) == pytest.approx(record.after["image_error"])
    assert list(trajectory.x) == list(range(1, STEPS + 1))
    assert trajectory.series["quantized"][(STEPS - 1) // 2] == record.after["trajectory_error"] > 0
    assert median(predictions.series["quantized"]) == record.after["teacher_forced_error"] > 0
    mean, worst = temporal.series.values()
    assert sum(mean) / STEPS == pytest.approx(record.after["temporal_error"])
    assert all(one <= other for one, other in zip(mean, worst, strict=True))
    assert temporal.x == ranges.x == SCHEDULE
    assert "down_blocks.0.resnets.0.time_emb_proj and 7 more" in ranges.series


def test_the_naive_baseline_stands_between_full_precision_and_the_result(quantized):
    record, _, folder = quantized(FSC, "round", baseline=True)
    images, trajectory, predictions, temporal, ranges = record.figures
    assert list(images.rows) == ["full precision", "naive baseline", "quantized"]
    assert list(trajectory.series) == list(predictions.series) == ["naive baseline", "quantized"]
    first, *others = (torch.stack(list(row)) for row in images.rows.values())
    metrics = [record.baseline, record.after]
    for row, curve, found in zip(others, trajectory.series.values(), metrics, strict=True):
        assert float((first - row).square().mean()) == pytest.approx(found["image_error"])
        assert curve[(STEPS - 1) // 2] == found["trajectory_error"] > 0
    means = [temporal.series[f"{judged}: mean"] for judged in ("naive baseline", "quantized")]
    assert [sum(mean) / STEPS for mean in means] == pytest.approx(
        [one["temporal_error"] for one in metrics]
    )
    assert ranges.series == quantized(FSC, "round")[0].figures[-1].series
    assert json.loads((folder / "metrics.json").read_text())["baseline"] == record.baseline


def test_the_naive_baseline_is_the_denoiser_rounded_to_nearest_and_changes_nothing_else(quantized):
    record, _, folder = quantized(FSC, "round", baseline=True)
    plain, alone = quantized("round")[0], quantized(FSC, "round")
    assert record.baseline == plain.after != record.after
    assert record.after == alone[0].after
    files = [(place / "model.safetensors").read_bytes() for place in (folder, alone[2])]
    assert files[0] == files[1]


@pytest.mark.parametrize(("baseline", "rows"), [(False, 2), (True, 3)])
def test_figures_stand_in_the_report(quantized, baseline, rows):
    record, page, _ = quantized(FSC, "round", baseline=baseline)
    results = page[page.index('<section id="results">') :]
    results = results[: results.index("</section>")]
    for figure in record.figures:
        assert f"<h3>{figure.title}</h3>" in results
        assert str(figure.draw().svg) in results
    assert results.count("<img") == 4 * rows
    assert results.count("<svg") == sum(isinstance(figure, Curves) for figure in record.figures) == 4
