"""Bias correction: the mean error of every output channel is gone, whatever the layer."""

import pytest
import torch
from torch import Tensor, nn

import ptqcore
from ptqcore.artifact import restore, save
from ptqcore.bias_correction import BiasCorrection, BiasCorrectionOptions, output_means
from ptqcore.blocks import Block
from ptqcore.calibration import Calibration
from ptqcore.errors import ModelError
from ptqcore.grids import Grids
from ptqcore.observers import MinMax
from ptqcore.recipe import QuantSection, TensorQuant
from ptqcore.rounding import Round
from ptqcore.step import Context, StepOptions
from ptqcore.walk import Walk

QUANT = QuantSection(weights=TensorQuant(bits=3, granularity="channel"))


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def context(quant: QuantSection = QUANT) -> Context:
    return Context(quant, lambda q: MinMax(q.spec), {}, 0, Grids(quant), None)


def calibrated(model: nn.Module, samples: list[Tensor]) -> tuple[Block, Calibration]:
    model.eval().requires_grad_(False)
    block = Block(model, "block")
    io = next(iter(Walk([block], samples, model, exact=True)))
    exact = io.run_tensors(exact=True)
    return block, Calibration(block, io, Grids(QUANT), lambda q: MinMax(q.spec), exact)


def quantized(model: nn.Module, samples: list[Tensor], correct: bool, **options: str) -> Calibration:
    block, calibration = calibrated(model, samples)
    steps = [Round(StepOptions(), context())]
    if correct:
        steps.append(BiasCorrection(BiasCorrectionOptions(**options), context()))
    for step in steps:
        step.before(block, calibration)
    for step in steps:
        step.block(block, calibration)
    return calibration


LAYERS = {
    "linear": lambda bias: nn.Sequential(nn.Linear(6, 5, bias=bias), nn.ReLU(), nn.Linear(5, 4, bias=bias)),
    "conv": lambda bias: nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=bias), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=bias)
    ),
    "transposed": lambda bias: nn.Sequential(
        nn.ConvTranspose2d(3, 6, 2, groups=3, bias=bias), nn.ReLU(), nn.Conv2d(6, 2, 1, bias=bias)
    ),
}


def samples_for(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (2, 7, 6) if kind == "linear" else (1, 3, 9, 9)
    return [torch.rand(shape, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("inputs", ["quantized", "full-precision"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_mean_error_of_every_layer_is_zero(kind, bias, inputs):
    torch.manual_seed(0)
    model, samples = Net(LAYERS[kind](bias)), samples_for(kind)
    paths = ["block.0", "block.2"]
    _, before = calibrated(model, samples)
    wanted = output_means(before, paths)
    calibration = quantized(model, samples, True, inputs=inputs)
    found = output_means(calibration, paths)
    for path in paths:
        assert float((found[path] - wanted[path]).abs().max()) < 1e-6


def test_without_correction_it_is_not():
    torch.manual_seed(0)
    model, samples = Net(LAYERS["linear"](True)), samples_for("linear")
    _, before = calibrated(model, samples)
    wanted = output_means(before, ["block.2"])["block.2"]
    found = output_means(quantized(model, samples, False), ["block.2"])["block.2"]
    assert float((found - wanted).abs().max()) > 1e-3


def test_one_linear_layer_is_corrected_by_its_weight_error_times_the_mean_input():
    torch.manual_seed(2)
    model, samples = Net(nn.Sequential(nn.Linear(6, 5))), samples_for("linear")
    weight, bias = model.block[0].weight.double(), model.block[0].bias.double()
    quantized(model, samples, True)
    mean = torch.cat(samples).double().flatten(0, -2).mean(0)
    error = (model.block[0].weight.double() - weight) @ mean
    torch.testing.assert_close(model.block[0].bias.double(), bias - error, rtol=0, atol=1e-6)


def test_a_layer_that_got_a_bias_is_restored(tmp_path):
    torch.manual_seed(3)
    model, samples = Net(LAYERS["conv"](False)), samples_for("conv")
    quantized(model, samples, True)
    save(model, tmp_path, "p", "t", ptqcore.__version__)
    restored = restore(tmp_path, lambda _: Net(LAYERS["conv"](False)))
    assert restored.block[0].has_new_bias
    assert restored.block[0].bias.abs().max() > 0
    assert torch.equal(restored(samples[0]), model(samples[0]))


def test_before_a_step_that_quantizes_it_is_refused():
    model, samples = Net(LAYERS["linear"](True)), samples_for("linear")
    block, calibration = calibrated(model, samples)
    step = BiasCorrection(BiasCorrectionOptions(), context())
    step.before(block, calibration)
    with pytest.raises(ModelError, match=r"bias-correction finds 'block\.0' in full precision: put it"):
        step.block(block, calibration)


def test_only_full_precision_inputs_need_the_second_stream():
    assert not BiasCorrection(BiasCorrectionOptions(), context()).needs_exact
    assert BiasCorrection(BiasCorrectionOptions(inputs="full-precision"), context()).needs_exact
