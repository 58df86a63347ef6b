"""Weights that give full-precision outputs from quantized inputs."""

import pytest
import tiny_lm
import torch

import ptqcore
from ptq_llm.asymmetric_calibration import corrections


def streams(tokens=400, channels=6, noise=0.3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, channels, generator=generator) @ torch.randn(
        channels, channels, generator=generator
    )
    return x, x + noise * torch.randn(tokens, channels, generator=generator)


def moved(weight, x, other, damping):
    weight = weight.float()
    return weight + corrections([weight], other.T @ other, (x - other).T @ other, damping)[0]


def test_without_damping_the_weight_is_the_least_squares_solution():
    x, other = streams()
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    wanted = torch.linalg.lstsq(other.double(), (x @ weight.T).double()).solution.T
    found = moved(weight, x, other, 1e-9).double()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_with_damping_it_minimises_the_error_plus_the_weighted_distance():
    x, other = streams()
    weight = torch.randn(1, 6, generator=torch.Generator().manual_seed(1)).double()
    damping = 0.5
    added = damping * float((other.T @ other).diagonal().mean())

    def objective(candidate):
        error = (other.double() @ candidate.T - x.double() @ weight.T).square().sum()
        return float(error + added * (candidate - weight).square().sum())

    best = moved(weight, x, other, damping).double()
    for seed in range(20):
        step = torch.randn(1, 6, generator=torch.Generator().manual_seed(seed)).double()
        assert objective(best) < objective(best + 1e-2 * step)


def test_equal_streams_move_nothing():
    x, _ = streams()
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(moved(weight, x, x, 0.1), weight)


def test_layers_that_read_the_same_inputs_are_moved_as_each_would_be():
    x, other = streams()
    weights = [torch.randn(rows, 6, generator=torch.Generator().manual_seed(rows)) for rows in (2, 5)]
    changes = corrections(weights, other.T @ other, (x - other).T @ other, 0.1)
    for weight, change in zip(weights, changes, strict=True):
        torch.testing.assert_close(weight + change, moved(weight, x, other, 0.1))


def test_a_channel_that_is_always_zero_is_no_obstacle():
    x, other = streams()
    x[:, 2] = other[:, 2] = 0
    assert torch.isfinite(moved(torch.ones(3, 6), x, other, 0.1)).all()


def test_inputs_that_are_tied_and_hardly_damped_are_solved_with_more_damping():
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 6)
    assert torch.isfinite(moved(torch.ones(3, 6), 2 * x, x, 1e-12)).all()


def run(tmp_path, name, steps, quant=None):
    folder = tiny_lm.save(tmp_path / "model") if not (tmp_path / "model").exists() else tmp_path / "model"
    weights = {"bits": 2, "granularity": "group", "group_size": 32, "symmetric": False}
    recipe = tiny_lm.recipe(
        folder,
        tmp_path,
        quant or {"weights": weights},
        steps=steps,
        calibration_samples=8,
    )
    return ptqcore.quantize(recipe, "llm", tmp_path / name)


@pytest.mark.parametrize("rest", [["round"], ["gptq"], ["clip", "gptq"]])
def test_it_brings_the_model_nearer_to_full_precision(tmp_path, rest):
    without = run(tmp_path, "without", rest)
    with_it = run(tmp_path, "with", ["asymmetric-calibration", *rest])
    assert with_it.after["kl_divergence"] < without.after["kl_divergence"]


def test_it_works_behind_a_step_that_moves_scales(tmp_path):
    quant = {
        "weights": {"bits": 4, "granularity": "channel"},
        "activations": {"bits": 4, "granularity": "token", "dynamic": True, "symmetric": False},
    }
    record = run(tmp_path, "out", ["smoothquant", "asymmetric-calibration", "gptq"], quant)
    assert record.after["kl_divergence"] < 3


def test_layers_that_no_token_reaches_stay_as_they_are(tmp_path):
    folder = tiny_lm.save(tmp_path / "model", "qwen3_moe")
    weights = {"bits": 4, "granularity": "group", "group_size": 32}
    recipe = tiny_lm.recipe(
        folder,
        tmp_path,
        {"weights": weights, "min_tokens": 0},
        steps=["asymmetric-calibration", "round"],
        calibration_samples=1,
        calibration_window=4,
    )
    record = ptqcore.quantize(recipe, "llm", tmp_path / "out")
    assert len(record.layers) == 3 * (4 + 2 * 8)
    assert record.after["perplexity"] > 0
