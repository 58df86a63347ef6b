"""Low-rank error correction: learned beside the rounded weights of several blocks, merged, and rounded."""

import itertools
import json

import pytest
import tiny_lm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny_blocks import quantization, setup, texts, unified
from torch import nn

import ptqcore
from ptq_llm.low_rank import Correction, LowRank, LowRankOptions
from ptqcore import Chain, ModelError, QuantizedTensor, QuantLinear, QuantSpec, RecipeError
from ptqcore.recipe import Recipe, validate

# One layer


def correction(weight, rank=3, seed=0):
    ends = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    rounded = QuantizedTensor.from_range(weight, *ends, QuantSpec(bits=3, granularity="channel"))
    ones = torch.ones(len(weight), 1)
    made = Correction(weight, rounded, (ones, ones), rank, torch.Generator().manual_seed(seed))
    return made, rounded


@pytest.mark.parametrize(
    "inputs", [None, QuantSpec(bits=4, granularity="token", dynamic=True, symmetric=False)]
)
def test_beside_a_layer_it_is_the_product_with_the_rounded_input(inputs):
    torch.manual_seed(0)
    layer, x = nn.Linear(10, 6).requires_grad_(False), torch.randn(7, 10)
    made, rounded = correction(layer.weight)
    quantized = QuantLinear(layer, rounded.spec, inputs)
    quantized.set_weight(rounded)
    plain = quantized(x)
    quantized.register_forward_hook(made.correct)
    assert torch.equal(quantized(x), plain)  # B is 0 at first
    with torch.no_grad():
        made.up.normal_()
    on_grid = x if inputs is None else quantized.input_quantizer(x)
    added = made.down @ made.up / 3  # A B / r
    torch.testing.assert_close(quantized(x), F.linear(on_grid, rounded.dequantize() + added.T, layer.bias))
    torch.testing.assert_close(made.corrected(), layer.weight + added.T)


def test_a_correction_has_as_many_numbers_as_two_thin_matrices():
    made, _ = correction(torch.randn(6, 10), rank=4)
    assert made.down.numel() + made.up.numel() == 4 * (10 + 6)
    assert made.down.requires_grad
    assert made.up.requires_grad
    assert not made.up.any()
    assert 0 < made.down.abs().max() <= (3 / 10) ** 0.5  # uniform, of variance 1 / inputs


# One span


def quantize(made, step, io):
    """Let a step quantize a block; the block's outputs in full precision."""
    exact = io.run_tensors(exact=True)
    calibration = made.calibration(io, exact)
    _ = calibration.targets
    step.block(io.block, calibration)
    return exact


def spanned(name="llama", layers=3, bits=4, activations=4, samples=10, prefix=0, seed=0, **options):
    """A step that has quantized all blocks of a model, and the chain from behind some of them."""
    model = unified(name, num_hidden_layers=layers)
    made = setup(model, quantization(bits, activations), texts(model, [32] * samples, seed=seed))
    step = made.prepare(
        LowRank(LowRankOptions(**({"blocks": layers, "rate": 5e-3} | options)), made.context)
    )
    walk = made.walk(exact=True)
    for index, io in enumerate(walk):
        if index == prefix:
            walk.hold()
        exact = quantize(made, step, io)
        walk.advance(io.run_tensors(), exact)
    return made, step, walk.blocks[prefix:], Chain(samples, walk.chain, exact)


def error(chain):
    """The mean squared error behind the span, over all samples."""
    with torch.no_grad():
        pairs = [(chain.run(index)[0], chain.exact[index][0]) for index in range(chain.samples)]
    return sum(float((found - wanted).square().mean()) for found, wanted in pairs) / chain.samples


def layers_of(blocks):
    return {path: layer for block in blocks for path, layer in block.quantized_layers().items()}


@pytest.mark.parametrize("layers", [1, 3])
def test_a10_the_error_falls_by_a_fifth_while_it_learns_and_never_rises_by_merging(layers):
    """Rank 4, 100 updates, 4 bits."""
    _, step, blocks, chain = spanned(layers=layers, rank=4, epochs=10)
    before = error(chain)
    losses = step.finish_span(blocks, chain)
    assert len(losses) == 100
    assert sum(losses[:10]) / 10 == pytest.approx(before, rel=0.05)
    assert sum(losses[-10:]) / 10 <= 0.8 * before
    assert error(chain) < 0.95 * before


def learned(blocks):
    """The mean loss of the last epoch behind two blocks that are corrected so many at a time."""
    model = unified("llama", num_hidden_layers=2)
    made = setup(model, quantization(4, 4), texts(model, [32] * 10))
    step = made.prepare(LowRank(LowRankOptions(blocks=blocks, rate=5e-3), made.context))
    walk = made.walk(exact=True)
    ios = iter(walk)
    for start in range(0, 2, blocks):
        walk.hold()
        for io in itertools.islice(ios, blocks):
            exact = quantize(made, step, io)
            walk.advance(io.run_tensors(), exact)
        losses = step.finish_span(walk.blocks[start : start + blocks], Chain(10, walk.chain, exact))
        walk.rewind()
        for io in itertools.islice(ios, blocks):
            walk.advance(io.run_tensors())
    return sum(losses[-10:]) / 10


def test_a10_two_blocks_learn_more_together_than_one_after_the_other():
    """Before they are merged: the second of two alone cannot undo what merging did to the first."""
    assert learned(2) <= learned(1)


def test_a10_what_is_deployed_is_the_corrected_weight_rounded_bit_for_bit():
    made, step, blocks, chain = spanned(epochs=3)
    seen = dict(step._corrections)
    keys = {path: set(layer.state_dict()) for path, layer in layers_of(blocks).items()}
    floats = {path: one._weight.clone() for path, one in seen.items()}
    step.finish_span(blocks, chain)
    assert seen.keys() == layers_of(blocks).keys()
    changed = 0
    for path, layer in layers_of(blocks).items():
        down, up = seen[path].down.detach(), seen[path].up.detach()
        weight = floats[path] + (down @ up).T / 4
        low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
        expected = QuantizedTensor.from_range(weight, low, high, made.context.grids.weights(path).spec)
        for name in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(layer.quantized_weight, name), getattr(expected, name))
        assert torch.equal(layer.weight, expected.dequantize())
        assert not layer._forward_hooks  # nothing stays beside it
        assert set(layer.state_dict()) == keys[path]
        changed += not torch.equal(expected.codes, seen[path].rounded.codes)
    assert changed == len(seen)


def test_a_range_that_a_step_has_set_keeps_its_share_of_the_extremes():
    """Clipped to half of what the weight reaches: so is the corrected weight."""
    made = setup(unified("llama", num_hidden_layers=1), quantization(4, None))
    step = made.prepare(LowRank(LowRankOptions(), made.context))
    io = next(iter(made.walk()))
    calibration = made.calibration(io)
    _ = calibration.targets
    for path, layer in io.block.layers().items():
        low, high = calibration.weight_range(path, layer)
        calibration.set_weight_range(path, 0.5 * low, 0.8 * high)
    step.block(io.block, calibration)
    for path, one in step._corrections.items():
        with torch.no_grad():
            one.up.normal_(0, 0.5)
        weight = one.corrected()
        low, high = 0.5 * weight.amin(1, keepdim=True), 0.8 * weight.amax(1, keepdim=True)
        expected = QuantizedTensor.from_range(weight, low, high, one.rounded.spec)
        torch.testing.assert_close(step._rounded(path, one).scale, expected.scale)
        assert not torch.allclose(expected.scale, one.rounded.scale)


def test_where_nothing_is_gained_the_blocks_stay_as_they_were(capsys):
    _, step, blocks, chain = spanned(layers=1, rate=0.5, epochs=2)
    before = error(chain)
    rounded = {path: one.rounded.codes.clone() for path, one in step._corrections.items()}
    step.finish_span(blocks, chain)
    assert error(chain) == before
    assert all(
        torch.equal(layer.quantized_weight.codes, rounded[p]) for p, layer in layers_of(blocks).items()
    )
    assert "low-rank: nothing is gained for model.layers.0, which stay" in capsys.readouterr().err


def test_what_diverges_is_one_sentence():
    _, step, blocks, chain = spanned(layers=1, rate=1e18, epochs=3)
    with pytest.raises(
        ModelError, match=r"low-rank correction of model\.layers\.0 diverges: lower the rate"
    ):
        step.finish_span(blocks, chain)


def test_activations_of_the_dataflow_are_refused():
    made = setup(unified("llama"), quantization(8, 8, static=True) | {"scope": "dataflow"})
    with pytest.raises(RecipeError, match=r"'quant\.scope' is 'dataflow'"):
        LowRank(LowRankOptions(), made.context)


# Whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Six blocks: a span of four, and one of two."""
    folder = tmp_path_factory.mktemp("model")
    tiny_lm.write_text(folder / "text.txt", 600)
    return tiny_lm.save(folder / "llama", "llama", num_hidden_layers=6)


def run(model, output, resume=False, seed=0, step=None):
    text = str(model.parent / "text.txt")
    task = {"kind": "causal-lm", "model": str(model), "text": text, "calibration": text, "window": 16}
    data = {
        "name": "tiny",
        "seed": seed,
        "task": task | {"calibration_window": 16, "calibration_samples": 3, "max_windows": 2},
        "quant": quantization(4, 4),
        "steps": [step or {"low-rank": {"epochs": 2, "rate": 5e-3}}],
    }
    return ptqcore.quantize(validate(Recipe, data), "llm", output, resume)


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    return run(model, output), output


def weights(output):
    return (output / "model.safetensors").read_bytes()


def test_every_layer_of_every_block_is_quantized_the_last_span_shorter(whole):
    """In a count of blocks that four does not divide none is left out."""
    record, output = whole
    layers = json.loads((output / "manifest.json").read_text())["layers"]
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert layers.keys() == {f"model.layers.{index}.{name}" for index in range(6) for name in names}
    learned = [bool(block.losses) for block in record.blocks]
    assert learned == [False, False, False, True, False, True]
    assert len(record.blocks[3].losses) == len(record.blocks[5].losses) == 2 * 3


@pytest.mark.parametrize("fails_in", [2, 5])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(model, whole, tmp_path, monkeypatch, fails_in):
    block = LowRank.block

    def failing(self, block_, calibration):
        if block_.path == f"model.layers.{fails_in}":
            raise KeyboardInterrupt
        block(self, block_, calibration)

    with monkeypatch.context() as patched:
        patched.setattr(LowRank, "block", failing)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "out")
    finished = sorted(file.stem for file in (tmp_path / "out/.work").glob("block-*.json"))
    assert finished == [f"block-{index:04}" for index in range(fails_in // 4 * 4)]
    run(model, tmp_path / "out", resume=True)
    assert weights(tmp_path / "out") == weights(whole[1])


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(model, whole, tmp_path):
    run(model, tmp_path / "again")
    run(model, tmp_path / "other", seed=1)
    assert weights(tmp_path / "again") == weights(whole[1])
    assert weights(tmp_path / "other") != weights(whole[1])


def test_an_artifact_has_no_more_tensors_than_one_that_was_rounded(model, whole, tmp_path):
    run(model, tmp_path / "round", step="round")
    names = [load_file(output / "model.safetensors") for output in (tmp_path / "round", whole[1])]
    shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in names]
    assert shapes[0] == shapes[1]
