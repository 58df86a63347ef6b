"""Denoisers on grids everywhere: products of attention, skip concatenations, sums; one range a timestep."""

from functools import partial

import pytest
import tiny_denoisers
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler

import ptq_diffusion
import ptqcore
from ptqcore import find_recipe, timesteps_of
from ptqcore.dataflow import tensors_in, trace
from ptqcore.decompositions import in_steps
from ptqcore.edges import ActivationQuantizers, quantizers_of
from ptqcore.grids import make_grids
from ptqcore.modules import quantizable_layers
from ptqcore.placement import moves
from ptqcore.recipe import QuantSection, TensorQuant
from ptqcore.timesteps import Timesteps

PRODUCTS = {
    "unet": 8,
    "sd1": 16,
    "sdxl": 16,
    "dit": 4,
    "pixart": 8,
    "sd3": 4,
    "flux": 4,
    "wan": 8,
    "sana": 8,
}
SCHEDULE = [0, 166, 332, 498, 664, 830]


def grids_of(style, timesteps=()):
    """The dataflow map of a tiny denoiser in steps, and the grids of its activations."""
    model = tiny_denoisers.build(style).requires_grad_(False)
    flow = trace(model, in_steps(partial(tiny_denoisers.call_of(style, model).run, model)))
    quant = QuantSection(
        weights=TensorQuant(bits=8), activations=TensorQuant(bits=8, symmetric=False), scope="dataflow"
    )
    return flow, make_grids(quant, flow, set(quantizable_layers(model)), timesteps)


def on_grids(flow, grids):
    """The tensors that are rounded."""
    ops = {op.site: op for op in flow.ops}
    return {
        (ops[edge.site].inputs if edge.side == "input" else ops[edge.site].outputs)[edge.index]
        for edge in grids.edges
    }


def held(flow, grids, number):
    """The tensor whose grid another one is on: itself, or what it was before it was moved."""
    rounded, producers = on_grids(flow, grids), flow.producers()
    while number not in rounded:
        assert moves(producers[number])
        number = producers[number].inputs[0]
    return number


@pytest.mark.parametrize("style", tiny_denoisers.STYLES)
def test_both_factors_of_every_product_of_attention_are_on_a_grid(style):
    flow, grids = grids_of(style)
    variable = flow.variable()
    products = [op for op in flow.ops if op.name == "matmul" and variable.issuperset(op.inputs)]
    assert len(products) == PRODUCTS[style]
    assert not any("attention" in op.name for op in flow.ops)
    for op in products:
        assert len({held(flow, grids, number) for number in op.inputs}) == 2


@pytest.mark.parametrize("style", tiny_denoisers.STYLES)
def test_attention_in_steps_computes_the_same_denoiser(style):
    model = tiny_denoisers.build(style).requires_grad_(False)
    run = partial(tiny_denoisers.call_of(style, model).run, model)
    for found, expected in zip(tensors_in(in_steps(run)()), tensors_in(run()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", ["unet", "sd1", "sdxl"])
def test_both_parts_of_every_skip_concatenation_have_grids_of_their_own(style):
    flow, grids = grids_of(style)
    skips = [op for op in flow.ops if op.name == "cat" and op.site.owner.startswith("up_blocks")]
    assert len(skips) == 4
    for op in skips:
        assert len({held(flow, grids, number) for number in op.inputs}) == 2


@pytest.mark.parametrize("style", tiny_denoisers.STYLES)
def test_every_row_of_a_batch_is_rounded_with_the_range_of_its_timestep(style):
    model = tiny_denoisers.build(style).requires_grad_(False)
    call = tiny_denoisers.call_of(style, model)
    times = call.times.flatten().sort().values
    _, grids = grids_of(style, times.tolist())
    grids.range_for_each_timestep([path for path, _ in model.named_modules()])
    quantizers = ActivationQuantizers({edge: quant.spec for edge, quant in grids.edges.items()})
    for edge in quantizers.names:
        table = edge.site.owner == "pos_embed"  # of positions: it has no rows of the batch
        high = torch.tensor([2.0, 2.0] if table else [2.0, 1.5])
        quantizers[edge].set_range(-high, high)
    quantizers.attach(model)
    Timesteps.of(times.tolist(), call.timestep).attach(model)
    mixed, each = tensors_in(call.with_timestep(times).run(model)), []
    for time in times:
        each.append(tensors_in(call.with_timestep(time.expand(2)).run(model)))
    for row in range(2):
        torch.testing.assert_close(mixed[0][row], each[row][0][row], rtol=1e-4, atol=1e-5)


# A whole run of the recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    DDIMPipeline(tiny_pipelines.unet(), DDIMScheduler()).save_pretrained(place)
    return place


def run(folder, output, *changes):
    small = {"steps": 6, "calibration_samples": 8, "calibration_keep": 4, "samples": 4, "batch": 8}
    sizes = [f"task.{key}={value}" for key, value in small.items()]
    recipe = find_recipe("w8a8-integer", "diffusion", [f"task.pipeline={folder}", *sizes, *changes])
    return ptqcore.quantize(recipe, "diffusion", output)


STEPS = "[{finite-set-calibration: {scope: all}}, {tiar: {iterations: 20}}, %s]"


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    return run(folder, output, "steps=" + STEPS % "round"), output


def test_every_activation_has_a_range_for_each_timestep(finished):
    model = ptqcore.load(finished[1])
    assert timesteps_of(model).values.tolist() == SCHEDULE
    quantizers = quantizers_of(model)
    names = {str(edge) for edge in quantizers.names}
    attention = "mid_block.attentions.0"
    places = ("to_q:linear", "to_k:linear", "to_v:linear")
    assert names >= {*(f"{attention}.{place}" for place in places), f"{attention}:softmax"}
    assert names >= {"up_blocks.0:cat", "up_blocks.1:cat.1", f"{attention}:add", "conv_in:conv2d<0"}
    for edge in quantizers.names:
        assert quantizers[edge].spec.timesteps == len(SCHEDULE)
        assert quantizers[edge].scale.shape == (len(SCHEDULE),)
        assert bool((quantizers[edge].scale > 0).all())
    softmax = next(edge for edge in quantizers.names if str(edge) == f"{attention}:softmax")
    assert float(quantizers[softmax].scale.max()) <= 1 / 255 + 1e-7


def test_the_result_is_near_and_its_rows_have_the_ranges_of_their_own_timesteps(finished):
    model = ptqcore.load(finished[1])
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = model(x, torch.tensor([166, 664])).sample
        apart = torch.cat([model(x[:1], 166).sample, model(x[1:], 664).sample])
        found, expected = (one(x, 830).sample for one in (model, tiny_pipelines.unet()))  # x is noise
    assert (together - apart).square().sum() < 1e-3 * apart.square().sum()  # some roundings flip
    assert (found - expected).square().sum() < 2e-2 * expected.square().sum()


def test_diffusers_loads_it_again(finished):
    record, output = finished
    assert record.exports["diffusers"].largest_difference == 0
    pipeline = ptq_diffusion.load_pipeline(output / "exports" / "diffusers")
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(pipeline.unet(x, 332).sample, ptqcore.load(output)(x, 332).sample)


def test_the_report_draws_the_products(finished):
    page = (finished[1] / "report.html").read_text(encoding="utf-8")
    assert "mid_block.attentions.0:softmax" in page


def test_skip_concatenations_can_be_rounded_part_by_part(folder, tmp_path):
    steps = "[{finite-set-calibration: {scope: all}}, split-concatenations, round]"
    changes = (f"steps={steps}", "export=[]", "quant.activations.bits=4")
    run(folder, tmp_path / "out", *changes)
    quantizers = quantizers_of(ptqcore.load(tmp_path / "out"))
    skips = {str(edge): quantizers[edge] for edge in quantizers.names if "up_blocks.0:cat" in str(edge)}
    # The other part of the second one is on a grid of 4 bits already: another layer multiplies it.
    assert set(skips) == {"up_blocks.0:cat<0", "up_blocks.0:cat<1", "up_blocks.0:cat.1<0"}
    assert all(one.spec.bits == 4 and one.spec.timesteps == 6 for one in skips.values())
    first, second = (skips[f"up_blocks.0:cat<{part}"].scale for part in (0, 1))
    assert not torch.equal(first, second)


def test_block_reconstruction_learns_with_products_on_grids(folder, tmp_path):
    record = run(folder, tmp_path / "out", "steps=" + STEPS % "{brecq: {iterations: 20}}", "export=[]")
    losses = [block.losses for block in record.blocks if "attentions" in block.path and block.losses]
    assert losses
    assert all(torch.tensor(each).isfinite().all() for each in losses)
