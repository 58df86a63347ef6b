"""Recording a walk computes blocks for the samples that show where tensors go, and for no others."""

import pytest
import torch
from stacks import InPlace, Masked, MaskedStack, Residual, Stack
from torch import nn

from ptqcore.blocks import find_blocks
from ptqcore.dataflow import tensors_in, trace
from ptqcore.modules import quantizable_layers
from ptqcore.walk import Walk


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Scaling(Stack):
    """Reads a number out of what a layer returns."""

    def run_layers(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x / x.abs().max().item()
        return x


class Choosing(Stack):
    """Goes one way or the other with what a layer returns, in the same number of functions."""

    def run_layers(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x.relu() if x.sum() > 0 else x.tanh()
        return x


class Fragile(Stack):
    """Takes no zeros."""

    def run_layers(self, x):
        for layer in self.layers:
            x = layer(x)
            if not x.any():
                raise ValueError("zeros")
        return x


class Unpacking(nn.Module):
    """A block that returns its own input beside a new tensor."""

    def __init__(self):
        super().__init__()
        self.inner = Residual()

    def forward(self, x):
        return x, self.inner(x)


class Branched(Stack):
    def run_layers(self, x):
        for layer in self.layers:
            x, y = layer(x)
            x = x + y
        return x


def computed(model, samples):
    """The walk, and how often each block was computed while it was recorded."""
    flow = trace(model, lambda: model(samples[0].clone()))
    blocks = find_blocks(model, flow, set(quantizable_layers(model)) - {"stem", "head"}, "layers.*")
    counts = [0] * len(blocks)

    def count(index):
        def note(*_):
            counts[index] += 1

        return note

    inside = [next(iter(block.layers().values())) for block in blocks]
    handles = [layer.register_forward_hook(count(index)) for index, layer in enumerate(inside)]
    walk = Walk(blocks, samples, lambda sample: model(sample.clone()))
    for handle in handles:
        handle.remove()
    return walk, counts


def assert_walked(model, walk, samples):
    """What the last block returns is what it returns in whole passes."""
    seen = []
    walk.blocks[-1].module.register_forward_hook(lambda _, __, output: seen.append(tensors_in(output)))
    with torch.no_grad():
        for sample in samples:
            model(sample.clone())
    for io in walk:
        outputs = io.run_tensors()
        walk.advance(outputs)
    for ours, theirs in zip(outputs, seen[: len(samples)], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def samples_of(*rows):
    return [torch.randn(count, 6) for count in rows]


def test_blocks_are_computed_for_two_samples_of_each_shape():
    model, samples = Stack([Residual(), Residual()]), samples_of(4, 4, 4, 7, 4, 7, 7, 7)
    walk, counts = computed(model, samples)
    assert counts == [4, 4]
    assert_walked(model, walk, samples)


def test_tuples_masks_and_keywords_are_stood_in_for():
    model, samples = MaskedStack([Masked(), Masked()]), samples_of(4, 4, 4, 4)
    walk, counts = computed(model, samples)
    assert counts == [2, 2]
    assert_walked(model, walk, samples)


@pytest.mark.parametrize("kind", [Scaling, Fragile])
def test_where_code_between_blocks_reads_values_all_are_computed(kind):
    model, samples = kind([Residual(), Residual()]), samples_of(4, 4, 4, 4)
    walk, counts = computed(model, samples)
    assert counts == [4, 4]
    assert_walked(model, walk, samples)


@pytest.mark.parametrize(
    "model", [Branched([Unpacking(), Unpacking()]), Stack([InPlace(), InPlace()])], ids=["input", "new"]
)
def test_only_blocks_that_return_new_tensors_are_stood_in_for(model):
    samples = samples_of(4, 4, 4, 4)
    walk, counts = computed(model, samples)
    assert counts == ([4, 4] if isinstance(model, Branched) else [2, 2])
    assert_walked(model, walk, samples)


def test_the_blocks_compute_again_afterwards():
    model, samples = Stack([Residual(), Residual()]), samples_of(4, 4, 4, 4)
    before = [model(sample) for sample in samples]
    computed(model, samples)
    assert all("forward" not in vars(layer) for layer in model.layers)
    assert all(torch.equal(model(sample), wanted) for sample, wanted in zip(samples, before, strict=True))


def test_a_way_that_depends_on_values_is_refused_as_always():
    model, samples = Choosing([Residual(), Residual()]), samples_of(*[4] * 12)
    with pytest.raises(Exception, match="takes another way through the model"):
        computed(model, samples)
