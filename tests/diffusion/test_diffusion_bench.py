"""The bench of ptq-diffusion: the re-created schedule is what it says, clocks and counters are right."""

import sys
from pathlib import Path

import pytest
import tiny_pipelines as tiny
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

sys.path.append(str(Path(__file__).parents[2] / "tools" / "bench"))

import diffusion
import published_schedule as published
import stages as clock
import timestep_lookup as lookup

from ptq_diffusion.drawing import SamplingOptions
from ptq_diffusion.judge import relative_error
from ptq_diffusion.pipelines import Loaded
from ptq_diffusion.sampling import sample
from ptqcore import (
    MSE,
    FakeQuant,
    LearnedRounding,
    QuantizedTensor,
    QuantModule,
    TensorQuant,
    tensors_in,
    timesteps_of,
)
from ptqcore.modules import quantizable_layers

STEPS = 4
IMAGES = 3
CHANNELS = TensorQuant(bits=4, symmetric=False, granularity="channel")


# The clock


@pytest.fixture
def stages(monkeypatch):
    """A clock on which a second passes at every look."""
    now = iter(range(1000))
    monkeypatch.setattr(clock.time, "process_time", lambda: next(now))
    return clock.Stages()


def test_a_stage_inside_another_pauses_it(stages):
    with stages("outer"):
        with stages("inner"):
            pass
        with stages("inner"):
            pass
    with stages("last"):
        pass
    assert stages.seconds == {clock.REST: 2, "outer": 3, "inner": 2, "last": 1}


def test_a_stage_ends_where_an_error_leaves_it(stages):
    with pytest.raises(ZeroDivisionError), stages("outer"):
        1 / 0  # noqa: B018
    with stages("last"):
        pass
    assert stages.seconds == {clock.REST: 2, "outer": 1, "last": 1}


def test_a_method_is_charged_to_its_stage(stages):
    class Worker:
        def work(self, x, times=1):
            return x * times

    stages.charge(Worker, "work", "work")
    assert Worker().work(3, times=2) == 6
    assert stages.seconds["work"] == 1


def test_calls_and_their_rows_are_counted_in_the_stage_in_which_they_begin():
    stages, network = clock.Stages(), nn.Linear(2, 2)
    with stages.counting(network):
        network(torch.zeros(3, 2))
        with stages("inner"):
            network(input=torch.zeros(4, 2))
            network(torch.zeros(1, 2))
    network(torch.zeros(9, 2))
    assert stages.calls == {clock.REST: 1, "inner": 2}
    assert stages.rows == {clock.REST: 3, "inner": 5}


# The published schedule, part by part


def test_scaled_schedules_show_every_image_as_often():
    full = published.Schedule()
    for scale in (1.0, 0.25, 1 / 16):
        scaled = full.scaled(scale)
        assert scaled.iterations / scaled.images == full.iterations / full.images
        assert (scaled.batch, scaled.rate) == (full.batch, full.rate)
    assert full.scaled(1) == full


def test_sampling_anew_for_every_step_takes_a_quadratic_number_of_calls():
    loaded, steps = Loaded(tiny.unet(), "denoiser", DDIMScheduler()), 6
    options, stages = SamplingOptions(steps=steps), clock.Stages()
    with stages("data"):
        calls = published.sample_anew(loaded, options, IMAGES, range(50, 100), stages)
    assert stages.calls == {"data": steps * (steps - 1) // 2}
    assert stages.rows == {"data": IMAGES * steps * (steps - 1) // 2}
    for step, call in enumerate(calls):
        seeds = range(50 + step * IMAGES, 50 + (step + 1) * IMAGES)
        noise = [torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        states = [torch.cat(noise), *sample(loaded, options, seeds).states]
        assert torch.equal(call.values["sample"], states[step])
        assert torch.equal(call.times, loaded.scheduler.timesteps[step].expand(IMAGES))


@pytest.mark.parametrize("shape", [(5, 7), (6, 3, 2, 2)])
def test_the_search_channel_by_channel_finds_what_the_vectorised_one_does(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape) ** 3
    observer = MSE(CHANNELS.spec)
    observer.update(weight.flatten(1))
    expected = QuantizedTensor.from_range(weight, *observer.range(), CHANNELS.spec)
    found = published.search_by_channel(weight, CHANNELS, candidates=80)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero_point, expected.zero_point)


def test_learning_makes_all_iterations_and_beats_rounding_to_nearest():
    torch.manual_seed(0)
    x = torch.randn(64, 4) @ torch.randn(4, 16)  # correlated: errors of weights can make up for each other
    weight = torch.randn(8, 16)
    nearest = published.search_by_channel(weight, CHANNELS, 20)
    rounding, batches = LearnedRounding(weight, nearest), []

    def predict(rows):
        batches.append(rows.tolist())
        return [x[rows] @ rounding.soft().T]

    schedule = published.Schedule(iterations=300, batch=16, rate=1e-2)
    published.learn(
        [rounding],
        predict,
        lambda rows: [x[rows] @ weight.T],
        64,
        schedule,
        torch.Generator().manual_seed(0),
    )
    assert len(batches) == 300
    assert all(len(set(batch)) == 16 for batch in batches)
    assert len({index for batch in batches for index in batch}) == 64

    def error(rounded):
        return float((x @ (rounded.dequantize() - weight).T).square().mean())

    assert error(rounding.hard()) < 0.7 * error(nearest)


# The published schedule as a whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny denoiser quantized, and the clock."""
    folder = tmp_path_factory.mktemp("published")
    DDIMPipeline(tiny.unet(), DDIMScheduler()).save_pretrained(folder / "pipeline")
    overrides = [f"task.pipeline={folder / 'pipeline'}", f"task.steps={STEPS}", "seed=1"]
    plan = diffusion.plan_of(diffusion.recipe_of(overrides))
    schedule = published.Schedule(images=IMAGES, iterations=2, candidates=2)
    stages = clock.Stages()
    model = published.quantize_as_published(plan, schedule, stages, folder)
    return model, stages


def test_all_layers_are_quantized_with_a_range_for_each_timestep(finished):
    model, _ = finished
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, QuantModule)}
    assert quantizable_layers(model, "") == {}
    bits = {path: layer.weight_spec.bits for path, layer in layers.items()}
    ends = {path for path, width in bits.items() if width == 8}
    assert {"conv_in", "conv_out"} <= ends
    assert {width for path, width in bits.items() if path not in ends} == {4}
    for layer in layers.values():
        assert layer.input_quantizer.scale.shape == (STEPS,)
        assert layer.input_quantizer.scale.isfinite().all()
    assert timesteps_of(model).values.tolist() == [0, 250, 500, 750]


def test_ranges_are_those_of_a_timesteps_images(finished):
    model, _ = finished
    loaded = Loaded(tiny.unet(), "denoiser", DDIMScheduler())
    seeds = range(10**6, 2 * 10**6)
    calls = published.sample_anew(loaded, SamplingOptions(steps=STEPS), IMAGES, seeds, clock.Stages())
    for row, call in enumerate(reversed(calls)):
        x = call.values["sample"]
        expected = FakeQuant(TensorQuant(bits=8, symmetric=False).spec)
        expected.set_range(x.min().clamp(max=0), x.max().clamp(min=0))
        assert torch.equal(model.conv_in.input_quantizer.scale[row], expected.scale[0])
        assert torch.equal(model.conv_in.input_quantizer.zero_point[row], expected.zero_point[0])


def test_the_network_runs_twice_from_its_input_for_every_block(finished):
    _, stages = finished
    rows, runs = stages.rows[published.BLOCKS], IMAGES * STEPS
    assert rows % (2 * runs) == 0
    assert rows // (2 * runs) > 3
    assert stages.calls[published.DATA] == STEPS * (STEPS - 1) // 2
    assert stages.rows[published.ACTIVATIONS] == 2 * runs  # the search, and the moving average
    assert stages.rows[published.TEMPORAL] == 0


def test_the_quantized_denoiser_is_like_the_float_one(finished):
    model, _ = finished
    call = lookup.Network("tiny", tiny.unet(), (1, 8, 8)).call(3)
    found, expected = (tensors_in(call.run(network))[0] for network in (model, tiny.unet()))
    assert 0 < relative_error(found, expected) < 0.3


# Tables


def cost(**seconds):
    found = dict.fromkeys(diffusion._STAGES, 0.0) | {
        getattr(published, name): value for name, value in seconds.items()
    }
    return diffusion.Cost(found, calls=1, rows=1)


def test_what_is_not_scaled_is_not_extrapolated():
    found = cost(DATA=1.0, RANGES=2.0, BLOCKS=8.0)
    assert found.total == 11
    assert found.in_full(0.25, (published.DATA, published.BLOCKS)) == 4 + 2 + 32


# Look-ups


def test_copies_differ_in_nothing_but_look_ups():
    network = lookup.Network("tiny", tiny.unet(), (1, 8, 8))
    paths = lookup.temporal_block(network)
    one, each = lookup.quantized(network.model), lookup.quantized(network.model, paths)
    found = {
        path
        for path, layer in each.named_modules()
        if isinstance(layer, QuantModule) and layer.input_quantizer.spec.timesteps
    }
    assert found == set(paths) != set()
    assert timesteps_of(one) is None
    call = network.call(2)
    with torch.no_grad():
        assert torch.equal(call.run(one)[0], call.run(each)[0])


def test_look_ups_are_timed_on_their_own():
    network = lookup.Network("tiny", tiny.unet(), (1, 8, 8))
    paths = tuple(quantizable_layers(network.model, ""))
    found = lookup.measure(network, paths, rows=1, repeats=3)
    assert found.layers == len(paths)
    assert 0 < found.entry < found.without
    assert found.share == (found.entry + found.inside) / found.without


# The recipe


def test_iterations_of_all_steps_are_scaled():
    def iterations(overrides):
        steps = diffusion.plan_of(diffusion.recipe_of(overrides)).step_classes
        return [options.iterations for _, options in steps if hasattr(options, "iterations")]

    full, half = iterations([]), iterations(diffusion.scaled_iterations(0.5))
    assert len(full) == 2
    assert half == [one // 2 for one in full]
