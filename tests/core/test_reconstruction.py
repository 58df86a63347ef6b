"""AdaRound, BRECQ, QDrop: closed forms, the optimiser, and whole runs."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_task import W3A4, manifest_of, run, weights_of
from torch import nn

import ptqcore
from ptqcore import ModelError, RecipeError, grid
from ptqcore.learned_rounding import BRECQ
from ptqcore.packed import QuantizedTensor
from ptqcore.problem import Objective, Problem, Schedule
from ptqcore.quantizers import FakeQuant, LearnedBias, LearnedCodes, LearnedRounding, LearnedStep
from ptqcore.reconstruction import reconstruct
from ptqcore.spec import QuantSpec

SPEC = QuantSpec(bits=3, granularity="channel")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def rounding_of(weight, spec=SPEC, kind=LearnedRounding):
    low, high = grid.value_range(weight, spec)
    return kind(weight, QuantizedTensor.from_range(weight, low, high, spec))


def linear_problem(weight, x, at_once=64, kind=LearnedRounding, **options):
    """The rounding of weight [out, in] that keeps x · Wᵀ, each row of x [samples, in] a sample."""
    rounding = rounding_of(weight, kind=kind)
    return Problem(
        "layer",
        range(len(x)),
        lambda chosen: [x[chosen] @ rounding.weight.T],
        lambda chosen: [x[chosen] @ weight.T],
        [rounding],
        [],
        at_once=at_once,
        **options,
    )


class Times(Objective):
    """The usual loss, times a factor."""

    def __init__(self, factor):
        self.factor, self.samples = factor, []

    def loss(self, predicted, target, samples):
        self.samples.append((len(samples), len(predicted[0]), len(target[0])))
        return super().loss(predicted, target, samples) * self.factor


def schedule(iterations=200, batch=16, rate=0.03, **options):
    return Schedule(iterations, batch, rate, 1e-2, **options)


def correlated(samples=64, channels=5, seed=0):
    """Inputs of which two directions make up almost everything."""
    return random(samples, 2, seed=seed) @ random(2, channels, seed=seed + 1) + 0.1 * random(
        samples, channels, seed=seed + 2
    )


def error_of(weight, x, rounded):
    return float((x @ (rounded - weight).T).square().sum())


def least_error(weight, x, rounding):
    """The error of the best of all ways to round every weight up or down, row by row."""
    gram, start = x.T @ x, rounding.start
    floor = grid.position(weight, start.scale, None, start.spec).floor()
    ways = torch.tensor(list(itertools.product([0.0, 1.0], repeat=weight.shape[1])))
    total = 0.0
    for row in range(len(weight)):
        codes = (floor[row] + ways).clamp(0, start.spec.levels)
        change = (codes - start.spec.middle) * start.scale[row] - weight[row]
        total += float(((change @ gram) * change).sum(1).min())
    return total


# The rounding that is learned


def test_inputs_one_channel_at_a_time_are_served_best_by_rounding_to_nearest():
    weight = random(4, 6)
    problem = linear_problem(weight, torch.eye(6) * torch.tensor([1.0, 2, 0.5, 3, 1, 2])[:, None])
    nearest = problem.weights[0].start.codes
    reconstruct(problem, schedule(100), generator())
    assert torch.equal(problem.weights[0].hard().codes, nearest)


def test_with_correlated_inputs_learned_rounding_is_closer_to_the_optimum_than_nearest():
    """Against the best of all 2^5 ways to round a row, in the mean over layers."""
    nearest, learned = [], []
    for seed in range(6):
        weight, x = random(2, 5, seed=seed), correlated(seed=100 + seed)
        problem = linear_problem(weight, x)
        (rounding,) = problem.weights
        least = least_error(weight, x, rounding)
        nearest.append(error_of(weight, x, rounding.hard().dequantize()) / least)
        reconstruct(problem, schedule(100, rate=0.06), generator())
        learned.append(error_of(weight, x, rounding.hard().dequantize()) / least)
    assert min(learned) >= 1 - 1e-3
    assert mean_of(learned) < mean_of(nearest)


def mean_of(ratios):
    """Geometric mean."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def test_the_regulariser_drives_roundings_up_or_down():
    problem = linear_problem(random(8, 16), random(64, 16, seed=1))
    reconstruct(problem, schedule(400, regularisation=(1.0, 1000.0)), generator())
    share = problem.weights[0].share_up().detach()
    open_ = ((share > 0.05) & (share < 0.95)).float().mean()
    assert float(open_) <= 0.05


def test_codes_go_as_far_as_the_target_asks_roundings_to_the_neighbour():
    """The target is that of another weight, some of whose codes are three steps away."""
    weight, x = random(4, 6), random(64, 6, seed=1)
    start = rounding_of(weight).start
    away = torch.zeros_like(start.codes).scatter_(1, start.codes.long().argmin(1, keepdim=True), 3)
    wanted = replace(start, codes=start.codes + away)
    found = {}
    for kind in (LearnedRounding, LearnedCodes):
        problem = linear_problem(weight, x, kind=kind)
        problem.target = lambda chosen: [x[chosen] @ wanted.dequantize().T]
        reconstruct(problem, schedule(400), generator())
        found[kind] = problem.weights[0].hard().codes.int() - wanted.codes.int()
        assert len(problem.history) == 400 or kind is LearnedRounding
    assert found[LearnedCodes].abs().max() == 0
    assert found[LearnedRounding].min() <= -2


def test_before_the_warm_up_ends_only_the_data_counts():
    """The full-precision weight fits its own outputs, and stays there."""
    weight, x = random(4, 6), random(32, 6, seed=1)
    problem = linear_problem(weight, x)
    (rounding,) = problem.weights
    rounded = error_of(weight, x, rounding.hard().dequantize()) / 32 / 4
    reconstruct(problem, schedule(50, warmup=1.1), generator())
    assert max(problem.history) < 1e-2 * rounded


def test_roundings_make_up_for_the_inputs_of_a_quantized_prefix():
    """What flows in differs from what the target was computed with (eq. 25): the loss decreases."""
    weight, x = random(6, 12), random(64, 12, seed=1)
    seen = x + 0.3 * x.roll(1, 1)
    problem = linear_problem(weight, x)
    (rounding,) = problem.weights
    problem.predict = lambda chosen: [seen[chosen] @ rounding.weight.T]

    def loss():
        return float((seen @ rounding.hard().dequantize().T - x @ weight.T).square().mean())

    before = loss()
    reconstruct(problem, schedule(400), generator())
    assert loss() < 0.8 * before


# The optimiser


def test_progress_is_relative_to_the_iterations():
    for iterations in (10, 1000):
        timing = schedule(iterations)
        assert timing.progress(0) == pytest.approx(-0.25)
        assert timing.progress(iterations // 5) == 0
        assert timing.progress(iterations) == pytest.approx(1)


def test_samples_computed_together_or_one_by_one_give_the_same_gradients():
    """Of a batch of 18, of which neither 4 nor 7 is a divisor."""
    weight, x = random(4, 6), correlated(32, 6)
    found = []
    for at_once in (1, 4, 7, 64):
        problem = linear_problem(weight, x, at_once)
        problem.target = lambda chosen: [x[chosen].roll(1, 1) @ weight.T]
        reconstruct(problem, schedule(1, 18, warmup=1.1), generator())
        found.append((problem.weights[0].variable.grad, torch.tensor(problem.history)))
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-4, atol=1e-6)


def test_the_random_numbers_follow_from_the_seed():
    def learned(seed):
        problem = linear_problem(random(4, 6), correlated(64, 6))
        reconstruct(problem, schedule(40), generator(seed))
        return problem.weights[0].variable.detach(), problem.history

    first, again, other = learned(1), learned(1), learned(2)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert first[1] != other[1]


def test_a_loss_that_does_not_fall_any_more_ends_the_loop():
    problem, _ = step_problem(torch.rand(64, 50, generator=generator()), 2.0)
    reconstruct(problem, Schedule(1000, 64, 1e-2, 1e-2), generator())
    assert 100 < len(problem.history) < 1000
    assert problem.history[-1] < 0.5 * problem.history[0]


def test_open_roundings_keep_the_loop_going():
    problem = linear_problem(random(4, 6), random(32, 6, seed=1))
    reconstruct(problem, schedule(60, warmup=1.1), generator())
    assert len(problem.history) == 60


def test_nothing_to_learn_takes_no_iteration():
    problem = Problem("block", range(3), lambda _: [], lambda _: [], [], [])
    reconstruct(problem, schedule(), generator())
    assert problem.history == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_block(value):
    problem = linear_problem(random(4, 6), random(8, 6, seed=1), objective=Times(value))
    with pytest.raises(FloatingPointError, match="'layer'"):
        reconstruct(problem, schedule(), generator())


def step_problem(x, high):
    """A step whose range [0, high] is far larger than that of x [samples, n]."""
    quantizer = FakeQuant(QuantSpec(bits=3, symmetric=False))
    quantizer.set_range(torch.tensor(0.0), torch.tensor(high))
    step = LearnedStep(quantizer)
    problem = Problem(
        "block", range(len(x)), lambda c: [step(x[c])], lambda c: [x[c]], [], [step], at_once=64
    )
    return problem, quantizer


def test_a_step_that_is_too_large_shrinks_and_the_loss_decreases():
    x = torch.rand(64, 50, generator=generator())
    problem, quantizer = step_problem(x, 2.0)
    before = float((quantizer(x) - x).square().mean())
    reconstruct(problem, Schedule(300, 16, 1e-2, 1e-2), generator())
    problem.steps[0].finish()
    assert len(problem.history) > 30
    assert float((quantizer(x) - x).square().mean()) < 0.5 * before
    assert float(quantizer.scale) == pytest.approx(1 / 7, rel=0.1)


class Judged(Objective):
    """Says how bad states are by a list, and notes when it is asked."""

    def __init__(self, scores, every=10):
        self.scores, self.every, self.begun, self.seen = iter(scores), every, [], []

    def before(self, updates):
        self.begun.append(updates)

    def judges(self, updates):
        return updates % self.every == 0

    def judge(self):
        self.seen.append(self.state())
        return next(self.scores)


@pytest.mark.parametrize(("scores", "best"), [([3, 2, 4, 5], 1), ([1, 2, 3, 4], 0), ([2, 2, 1, 1], 3)])
def test_the_best_state_that_was_judged_is_kept(scores, best):
    judged = Judged(scores)
    problem = linear_problem(random(4, 6), random(32, 6, seed=1), objective=judged)
    (rounding,) = problem.weights
    judged.state = lambda: (rounding.weight.clone(), rounding.variable.clone())
    reconstruct(problem, schedule(25, warmup=1.1), generator())
    assert judged.begun == list(range(25))
    assert len(judged.seen) == 4  # before the first, after 10 and 20, and at the end
    weights, variables = judged.seen[best]
    assert torch.equal(rounding.variable, variables)
    assert torch.equal(rounding.hard().dequantize(), weights)


def test_states_that_are_not_judged_are_the_last():
    x = torch.rand(64, 50, generator=generator())
    problem, _ = step_problem(x, 2.0)
    reconstruct(problem, Schedule(30, 16, 1e-2, 1e-2), generator())
    assert problem.steps[0].variable.item() < -0.1


def test_the_default_loss_adds_the_mean_squares_of_all_outputs():
    predicted = [torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0]])]
    target = [torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0]])]
    assert float(Objective().loss(predicted, target, [0])) == 2.5 + 9


# Whole runs


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return (x + self.b(self.a(x).relu())).relu()


class Net(nn.Module):
    """stem – two residual blocks – head, all convolutions."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.one, self.two, self.head = Residual(width), Residual(width), nn.Conv2d(width, 6, 1)

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x))))


def make(seed=0):
    """Weights with channels and tails of unequal size, as training leaves them."""
    torch.manual_seed(seed)
    model = Net().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(torch.randn_like(module.weight).exp())
    return model


def images(count=8, seed=0, size=8):
    """Smooth images with some noise."""
    coarse, fine = random(count, 3, 4, 4, seed=seed), random(count, 3, size, size, seed=seed + 1)
    return list((F.interpolate(coarse, (size, size), mode="bilinear") + 0.1 * fine).split(1))


STEPS = ["adaround", "brecq", "qdrop"]
steps = pytest.mark.parametrize("step", STEPS)


def test_adaround_learns_roundings_alone(tmp_path):
    for key in ("weights", "learn_steps", "learn_biases", "step_rate"):
        with pytest.raises(RecipeError, match=key):
            run(tmp_path, make, images(), {"adaround": {key: True}}, W3A4)


@steps
def test_before_anything_is_learned_every_step_is_rounding_to_nearest(tmp_path, step):
    still = {"iterations": 1, "rate": 1e-12}
    if step != "adaround":
        still["learn_steps"] = False
    run(tmp_path / "round", make, images(), "round", W3A4)
    run(tmp_path / step, make, images(), {step: still}, W3A4)
    assert weights_of(tmp_path / step) == weights_of(tmp_path / "round")


@steps
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, step):
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        run(tmp_path / name, make, images(), {step: {"iterations": 5, "batch": 4}}, W3A4, seed=seed)
    first, again, other = (weights_of(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert first != other


def test_qdrop_that_keeps_every_rounding_is_brecq_if_activations_are_not_rounded(tmp_path):
    run(tmp_path / "brecq", make, images(), {"brecq": {"iterations": 10}})
    run(tmp_path / "qdrop", make, images(), {"qdrop": {"iterations": 10, "keep": 1.0}})
    assert weights_of(tmp_path / "brecq") == weights_of(tmp_path / "qdrop")


def test_qdrop_that_drops_every_rounding_is_brecq_with_frozen_steps(tmp_path):
    options = {"iterations": 10, "learn_steps": False, "inputs": "quantized"}
    run(tmp_path / "brecq", make, images(), {"brecq": options}, W3A4)
    run(tmp_path / "qdrop", make, images(), {"qdrop": options | {"keep": 0.0}}, W3A4)
    run(tmp_path / "half", make, images(), {"qdrop": options | {"keep": 0.5}}, W3A4)
    assert weights_of(tmp_path / "brecq") == weights_of(tmp_path / "qdrop")
    assert weights_of(tmp_path / "brecq") != weights_of(tmp_path / "half")


def test_mixed_inputs_at_the_ends_are_one_of_the_streams(tmp_path):
    for keep, inputs in ((1.0, "quantized"), (0.0, "full-precision")):
        for name in ("mixed", inputs):
            options = {"iterations": 4, "keep": keep, "inputs": name}
            run(tmp_path / f"{keep} {name}", make, images(), {"qdrop": options}, W3A4)
        assert weights_of(tmp_path / f"{keep} mixed") == weights_of(tmp_path / f"{keep} {inputs}")


def test_adaround_of_one_layer_is_brecq_of_it(tmp_path):
    """Without activations a block of one layer is what AdaRound reconstructs."""

    def single():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 5, 3))

    for step in ("adaround", "brecq"):
        run(tmp_path / step, single, images(16), {step: {"iterations": 60}})
    assert weights_of(tmp_path / "adaround") == weights_of(tmp_path / "brecq")


@pytest.mark.parametrize("scope", ["layers", "dataflow"])
@steps
def test_samples_of_different_shapes_are_learned_from_too(tmp_path, step, scope):
    samples = images(2) + images(2, 1, 6) + images(1, 2, 10)
    record = run(tmp_path, make, samples, {step: {"iterations": 3}}, W3A4 | {"scope": scope})
    assert len(record.blocks) == 4
    assert all(0 < block.relative_error < 1 for block in record.blocks)


@steps
def test_computing_in_half_precision_learns_as_well(tmp_path, step):
    options = {"iterations": 5, "precision": "bfloat16"}
    record = run(tmp_path, make, images(), {step: options}, W3A4)
    assert all(math.isfinite(block.relative_error) for block in record.blocks)


@pytest.mark.parametrize("step", ["brecq", "qdrop"])
def test_ranges_of_activations_are_learned_and_never_grow(tmp_path, step):
    run(tmp_path / "round", make, images(), "round", W3A4)
    run(tmp_path / step, make, images(), {step: {"iterations": 20}}, W3A4)
    first, learned = (
        ptqcore.load(tmp_path / name, make()).activation_quantizers.state_dict() for name in ("round", step)
    )
    image = "stem/0:conv2d<0.scale"
    assert first.keys() == learned.keys()
    assert float(learned[image]) < float(first[image])


@pytest.mark.parametrize("step", ["brecq", "qdrop"])
def test_biases_are_learned_where_that_is_wanted(tmp_path, step):
    biases = {}
    for name, wanted in (("with", True), ("without", False)):
        options = {"iterations": 40, "batch": 8, "learn_biases": wanted}
        run(tmp_path / name, make, images(), {step: options}, W3A4)
        model = ptqcore.load(tmp_path / name, make())
        biases[name] = model.get_submodule("one.a").bias
    moved = (biases["with"] - biases["without"]).abs().max().item()
    assert moved > 0.01 * biases["without"].abs().max().item()


def test_a_learned_bias_moves_in_units_of_its_layer():
    bias = torch.tensor([1.0, -2.0])
    learned = LearnedBias(bias, unit=4.0)
    with torch.no_grad():
        learned.variable += torch.tensor([0.25, 0.5])
    assert learned.value.tolist() == [2.0, 0.0]
    assert bias.tolist() == [1.0, -2.0]
    learned.finish()
    assert bias.tolist() == [2.0, 0.0]


def test_network_wise_is_one_block_of_everything(tmp_path):
    step = {"qdrop": {"iterations": 20, "batch": 8}}
    record = run(tmp_path, make, images(), step, W3A4, blocks="network-wise")
    assert manifest_of(tmp_path)["layers"].keys() == {"stem.0", "one.a", "one.b", "two.a", "two.b", "head"}
    assert [block.path for block in record.blocks] == [""]
    assert len(record.blocks[0].losses) == 20


class Scaled(BRECQ):
    """A loss of one's own."""

    name = "scaled"
    seen: list = []  # noqa: RUF012

    def objective(self, learner, phase, calibration):
        found = Times(7)
        Scaled.seen.append((calibration.block.path, phase.weights, found))
        return found


class Broken(BRECQ):
    name = "broken"

    def objective(self, learner, phase, calibration):
        return Times(math.inf)


OWN = {"scaled": f"{__name__}:Scaled", "broken": f"{__name__}:Broken"}


def test_a_subclass_brings_its_own_loss(tmp_path):
    Scaled.seen.clear()
    run(tmp_path, make, images(), {"scaled": {"iterations": 4, "batch": 8}}, steps=OWN)
    assert [block for block, _, _ in Scaled.seen[::2]] == ["stem", "one", "two", "head"]
    assert [weights for _, weights, _ in Scaled.seen] == [True, False] * 4
    sizes = [size for _, _, objective in Scaled.seen for size in objective.samples]
    assert sizes
    assert all(samples == predicted == target for samples, predicted, target in sizes)


def test_a_loss_that_is_not_finite_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"block 'stem' is (nan|inf).*lower the step's rate") as caught:
        run(tmp_path, make, images(), {"broken": {"iterations": 4}}, steps=OWN)
    assert "\n" not in str(caught.value)


def test_the_layers_are_quantized_as_the_recipe_says(tmp_path):
    run(tmp_path, make, images(), {"qdrop": {"iterations": 2}}, W3A4 | {"first_last_bits": 8})
    bits = {path: layer["weight"]["bits"] for path, layer in manifest_of(tmp_path)["layers"].items()}
    assert bits == {"stem.0": 8, "one.a": 3, "one.b": 3, "two.a": 3, "two.b": 3, "head": 8}


def block_error(folder, seed, samples):
    """Mean over the blocks of ‖Q − F‖² / ‖F‖², each in its own whole pass."""
    outputs = []
    for model in (ptqcore.load(folder, make(seed)), make(seed)):
        seen = {}
        for name, block in model.named_children():
            if name in ("stem", "one", "two", "head"):
                block.register_forward_hook(
                    lambda _, args, y, name=name, seen=seen: seen.setdefault(name, []).append(y)
                )
        with torch.no_grad():
            for sample in samples:
                model(sample)
        outputs.append({name: torch.cat(parts) for name, parts in seen.items()})
    quantized, exact = outputs
    errors = [
        float((quantized[name] - exact[name]).square().sum() / exact[name].square().sum()) for name in exact
    ]
    return sum(errors) / len(errors)


def mean_error(tmp_path, step, **options):
    """Mean of the block error over three networks."""
    total = 0.0
    for seed in range(3):
        entry = step if step == "round" else {step: {"iterations": 15, "batch": 8, **options}}
        folder = tmp_path / f"{step}-{len(options)}-{seed}"
        run(folder, lambda seed=seed: make(seed), images(8, seed), entry, W3A4)
        total += block_error(folder, seed, images(8, seed)) / 3
    return total


def test_learned_rounding_is_much_better_than_nearest(tmp_path):
    errors = {step: mean_error(tmp_path, step) for step in ("round", *STEPS)}
    assert all(errors[step] < 0.7 * errors["round"] for step in STEPS)
    for step in ("brecq", "qdrop"):
        assert mean_error(tmp_path, step, weights="adaquant") < 0.7 * errors["round"]
        assert weights_of(tmp_path / f"{step}-1-0") != weights_of(tmp_path / f"{step}-0-0")
