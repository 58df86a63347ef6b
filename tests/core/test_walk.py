"""The walk: replayed blocks, and what is computed between them, give what the whole model gives."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from stacks import InPlace, KeywordStack, Masked, MaskedStack, Residual, Stack
from torch import nn

from ptqcore import Block, ModelError, QuantizedTensor, QuantLinear, QuantSpec
from ptqcore.blocks import find_blocks
from ptqcore.dataflow import Site, tensors_in, trace
from ptqcore.edges import applying
from ptqcore.modules import quantizable_layers
from ptqcore.placement import Edge
from ptqcore.walk import Walk


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def blocks_of(model, sample):
    """The blocks without the stem and the head."""
    flow = trace(model, lambda: model(sample.clone()))
    return find_blocks(model, flow, set(quantizable_layers(model)) - {"stem", "head"})


STACKS = {
    "plain": lambda: Stack([Residual() for _ in range(3)]),
    "keywords": lambda: KeywordStack([Residual() for _ in range(3)]),
    "in place": lambda: Stack([InPlace() for _ in range(3)]),
    "masks and tuples": lambda: MaskedStack([Masked() for _ in range(3)]),
    "sequential": lambda: nn.Sequential(*(InPlace() for _ in range(3))),
    "one block": lambda: Stack([InPlace()]),
}


def walk_of(model, samples):
    """The walk over the model's layers, each sample a different number of rows."""
    blocks = blocks_of(model, samples[0])
    assert len(blocks) == len(getattr(model, "layers", model))
    return Walk(blocks, samples, lambda sample: model(sample.clone()))


def last_block_outputs(model, block, samples, functions=None):
    """What a block returns in whole forward passes of the model as it now is."""
    seen = []
    handle = block.module.register_forward_hook(
        lambda _, args, output: seen.append([tensor.clone() for tensor in tensors_in(output)])
    )
    with torch.no_grad():
        for sample in samples:
            with applying(model, "", functions or {}):
                model(sample.clone())
    handle.remove()
    return seen


def assert_equal(left, right):
    """Equal but for the order of sums: views are replayed as copies, which other kernels read."""
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", STACKS)
def test_replayed_blocks_give_what_the_whole_model_gives(kind):
    model, samples = STACKS[kind](), [torch.randn(rows, 6) for rows in (4, 1, 7)]
    walk = walk_of(model, samples)
    for io in walk:
        outputs = io.run_tensors()
        walk.advance(outputs)
    assert_equal(outputs, last_block_outputs(model, walk.blocks[-1], samples))


@pytest.mark.parametrize("kind", STACKS)
def test_a_changed_block_changes_what_flows_into_the_next(kind):
    model, samples = STACKS[kind](), [torch.randn(rows, 6) for rows in (4, 1, 7)]
    walk = walk_of(model, samples)
    before = last_block_outputs(model, walk.blocks[-1], samples)
    for io in walk:
        with torch.no_grad():
            io.block.module.first.weight.mul_(1.5)
        outputs = io.run_tensors()
        walk.advance(outputs)
    assert_equal(outputs, last_block_outputs(model, walk.blocks[-1], samples))
    assert not torch.equal(outputs[0][0], before[0][0])


def test_a_block_that_works_in_place_may_be_run_again():
    model = Stack([InPlace(), InPlace()])
    walk = walk_of(model, [torch.randn(4, 6)])
    for io in walk:
        first = io.run_tensors()
        assert_equal(first, io.run_tensors())
        walk.advance(first)


@pytest.mark.parametrize("kind", STACKS)
def test_a_block_computes_with_other_parameters_and_hands_gradients_on(kind):
    model, sample = STACKS[kind]().requires_grad_(False), torch.randn(4, 6)
    io = next(iter(walk_of(model, [sample])))
    own, other = io.block.module.first.weight, torch.randn(6, 6, requires_grad=True)
    path = f"{io.block.path}.first.weight"
    before = io.run_tensors()
    (found, *_) = tensors_in(io.compute(0, {path: other}))
    found.sum().backward()
    assert_equal(io.run_tensors(), before)
    own.data = other.detach()
    assert_equal([[found.detach()]], [io.run_tensors()[0][:1]])
    assert bool(other.grad.abs().sum() > 0)


def test_the_hooks_of_the_capture_are_gone_and_the_model_is_as_before():
    model, sample = Stack([Residual(), Residual()]), torch.randn(4, 6)
    before = model(sample)
    walk_of(model, [sample])
    assert torch.equal(model(sample), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_go_even_if_the_model_fails():
    model = Stack([Residual(), Residual()])
    blocks = blocks_of(model, torch.randn(4, 6))
    with pytest.raises(RuntimeError):
        Walk(blocks, [torch.randn(4, 5)], model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_model_behind_the_last_block_is_not_run_in_the_capture():
    model, called = Stack([Residual(), Residual()]), []
    blocks = blocks_of(model, torch.randn(4, 6))
    model.head.register_forward_hook(lambda *_: called.append(1))
    Walk(blocks, [torch.randn(4, 6)], model)
    assert not called


class Skipping(Stack):
    """Leaves its second layer out for short inputs."""

    def run_layers(self, x):
        x = self.layers[0](x)
        return self.layers[1](x) if len(x) > 2 else x


def test_a_block_that_one_sample_does_not_call_is_refused():
    model = Skipping([Residual(), Residual()])
    blocks = blocks_of(model, torch.randn(4, 6))
    with pytest.raises(ModelError, match="calibration sample 2"):
        Walk(blocks, [torch.randn(4, 6), torch.randn(1, 6)], model)


SPEC = QuantSpec(bits=8, granularity="channel")


def rounded(weight):
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    return QuantizedTensor.from_range(weight.detach(), low, high, SPEC)


def test_the_walk_goes_on_with_a_linear_block_that_was_quantized():
    model, sample = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(4, 6)
    walk = walk_of(model, [sample])
    assert [block.path for block in walk.blocks] == ["0", "1"]
    for io in walk:
        path = io.block.path
        io.block.quantize_layer(path, rounded(io.block.module.weight), None)
        outputs = io.run_tensors()
        walk.advance(outputs)
    with torch.no_grad():
        assert torch.equal(outputs[0][0], model(sample))
    assert all(isinstance(layer, QuantLinear) for layer in model)


# Any graph of blocks, and what is computed between them


class Net(nn.Module):
    """Blocks a, b, … and any function of them as the forward pass."""

    def __init__(self, forward, count=3, make=lambda: nn.Linear(6, 6)):
        super().__init__()
        self.compute = forward
        for name in "abcdefg"[:count]:
            self.add_module(name, make())

    def forward(self, *inputs):
        return self.compute(self, *inputs)


def branches(m, x):
    return m.c(m.a(x) * m.b(x) + 1)


def skip_around_everything(m, x):
    """A U-Net's last stage reads what the first one made."""
    first = m.a(x)
    second = m.b(F.max_pool1d(first, 2).repeat(1, 2))
    return m.c(torch.cat([first, second], 1)[:, 3:9])


def image_again(m, x):
    return m.c(m.b(m.a(x) + x) - x)


def halves(m, x):
    left, right = m.a(x).chunk(2, 1)
    return m.c(torch.cat([m.b(left.repeat(1, 2)), right], 1)[:, :6])


def in_place(m, x):
    y = m.a(x)
    y.mul_(2).relu_()
    z = m.b(y)
    z += y
    z[:, 0] = 1.0
    return m.c(z)


def in_place_on_the_image(m, x):
    y = m.a(x)
    x.mul_(2)
    return m.b(y + x)


def through_a_view(m, x):
    y = m.a(x)
    part = y[:, :3]
    part.relu_()
    return m.b(y)


GRAPHS = {
    "branches": (branches, 3),
    "a skip around everything": (skip_around_everything, 3),
    "the image again": (image_again, 3),
    "halves": (halves, 3),
    "in place": (in_place, 3),
    "in place on the image": (in_place_on_the_image, 2),
    "through a view": (through_a_view, 2),
}
graphs = pytest.mark.parametrize("graph", GRAPHS)


def net_of(graph):
    forward, count = GRAPHS[graph]
    return Net(forward, count).requires_grad_(False)


def walk_over(model, samples, **options):
    names = [name for name, _ in model.named_children()]
    return Walk([Block(model, name) for name in names], samples, lambda x: model(x.clone()), **options)


def passes(model, samples, functions=None):
    """Block → its outputs in whole passes of the model as it now is, functions of some edges applied."""
    return {
        name: last_block_outputs(model, Block(model, name), samples, functions)
        for name, _ in model.named_children()
    }


def copied(outputs):
    """Outputs as they are before functions behind the block write into them."""
    return [[tensor.clone() for tensor in sample] for sample in outputs]


def sampled(count=3):
    return [torch.randn(rows, 6) for rows in range(2, 2 + count)]


@graphs
def test_the_walk_follows_any_graph(graph):
    model, samples = net_of(graph), sampled()
    expected = passes(model, samples)
    walk = walk_over(model, samples)
    for io in walk:
        outputs = io.run_tensors()
        assert_equal(outputs, expected[io.block.path])
        walk.advance(outputs)


@graphs
def test_the_quantized_stream_is_the_changed_model_and_the_exact_one_the_model_as_it_was(graph):
    model, samples = net_of(graph), sampled()
    before, found = passes(model, samples), {}
    walk = walk_over(model, samples, exact=True)
    for io in walk:
        exact = io.run_tensors(exact=True)
        assert_equal(exact, before[io.block.path])
        io.block.module.weight.mul_(-1.5)
        outputs = io.run_tensors()
        found[io.block.path] = copied(outputs)
        walk.advance(outputs, exact)
    after = passes(model, samples)
    for path, outputs in found.items():
        assert_equal(outputs, after[path])
        assert not torch.equal(outputs[0][0], before[path][0][0])


def test_functions_in_front_of_the_first_block_are_part_of_its_input():
    model, samples = Net(lambda m, x: m.b(m.a((x * 2).relu_()) + 1), 2), sampled()
    walk = walk_over(model, samples)
    io = next(iter(walk))
    assert_equal(io.run_tensors(), passes(model, samples)["a"])


def test_a_sample_that_takes_another_way_is_refused():
    def forward(m, x):
        y = m.a(x)
        return m.b(y.relu() if len(y) > 2 else y)

    with pytest.raises(ModelError, match="calibration sample 2 takes another way"):
        walk_over(Net(forward, 2), [torch.randn(4, 6), torch.randn(1, 6)])


def test_while_outputs_are_consumed_nothing_of_the_block_is_in_force():
    """What the reader of `run` computes is neither rounded nor without gradients."""
    model, samples = Net(lambda m, x: m.a(x).relu(), 1, lambda: nn.Sequential(nn.Linear(6, 6))), sampled()
    io = next(iter(walk_over(model, samples)))
    io.functions = {Edge(Site("a", 0, "add", 0), "output"): torch.zeros_like}
    for output in io.run():
        assert torch.is_grad_enabled()
        assert torch.equal(torch.add(output, 0), output)


# Held, chained and walked again


def walked(walk, count, factor):
    """Walk so many blocks, each changed; the outputs of the last."""
    ios = iter(walk)
    for _ in range(count):
        io = next(ios)
        exact = io.run_tensors(exact=True)
        io.block.module.weight.mul_(factor)
        outputs = io.run_tensors()
        walk.advance(outputs, exact)
    return copied(outputs)


def chained(walk, samples):
    with torch.no_grad():
        return [walk.chain(index) for index in range(len(samples))]


@graphs
@pytest.mark.parametrize("before", [0, 1])
def test_a_chain_is_the_model_from_where_the_walk_is_held_with_the_blocks_as_they_now_are(graph, before):
    model, samples = net_of(graph), sampled()
    walk = walk_over(model, samples, exact=True)
    if before:
        walked(walk, before, 1.5)
    walk.hold()
    outputs = walked(walk, len(walk.blocks) - before, 1.5)
    assert_equal(chained(walk, samples), outputs)
    walk.blocks[before].module.weight.mul_(-0.5)
    last = walk.blocks[-1].path
    expected = passes(model, samples)[last]
    assert not torch.allclose(expected[0][0], outputs[0][0])
    for _ in range(2):  # as often as one likes
        assert_equal(chained(walk, samples), expected)


@graphs
@pytest.mark.parametrize("before", [0, 1])
def test_blocks_are_walked_again_from_where_the_walk_was_held(graph, before):
    model, samples = net_of(graph), sampled()
    exact = passes(model, samples)
    walk = walk_over(model, samples, exact=True)
    if before:
        walked(walk, before, 1.5)
    walk.hold()
    walked(walk, 1, 1.5)
    block = walk.blocks[before].module
    block.weight.mul_(-0.5)
    walk.rewind()
    again = next(iter(walk))
    assert again.block.module is block
    walk.advance(again.run_tensors())
    for io in walk:  # those behind, in both streams
        assert_equal(io.run_tensors(exact=True), exact[io.block.path])
        outputs = io.run_tensors()
        assert_equal(outputs, passes(model, samples)[io.block.path])
        walk.advance(outputs, io.run_tensors(exact=True))


def test_gradients_of_a_chain_reach_all_of_its_blocks():
    model, (sample,) = net_of("in place"), sampled(1)
    expected = torch.autograd.functional.jacobian(
        lambda weight: torch.func.functional_call(model, {"a.weight": weight}, (sample.clone(),)).sum(),
        model.a.weight,
    )
    walk = walk_over(model, [sample])
    walk.hold()
    walked_without_exact = [io for io in walk if walk.advance(io.run_tensors()) is None]
    assert len(walked_without_exact) == 3
    model.requires_grad_(True)
    walk.chain(0)[0].sum().backward()
    torch.testing.assert_close(model.a.weight.grad, expected)
    assert all(block.module.weight.grad is not None for block in walk.blocks)


def test_what_is_held_is_released_once_the_blocks_are_walked_again():
    model, samples = net_of("branches"), sampled()
    walk = walk_over(model, samples)
    walk.hold()
    kept = [weakref.ref(tensor) for stream in walk._held.streams for tensor in stream.values()]
    assert kept
    for io in walk:
        walk.advance(io.run_tensors())
    assert all(ref() is not None for ref in kept)
    walk.rewind()
    for io in walk:
        walk.advance(io.run_tensors())
    del io
    gc.collect()
    assert all(ref() is None for ref in kept)


# Memory


def test_what_no_block_reads_any_more_is_released():
    model, samples, seen = net_of("a skip around everything"), sampled(), {}
    walk = walk_over(model, samples, exact=True)
    for io in walk:
        exact, outputs = io.run_tensors(exact=True), io.run_tensors()
        alive = {name for name, refs in seen.items() if any(ref() is not None for ref in refs)}
        assert alive == {"b": {"a"}, "c": set()}.get(io.block.path, set())
        seen[io.block.path] = [weakref.ref(output[0]) for output in outputs + exact]
        walk.advance(outputs, exact)
        del outputs, exact, io
        gc.collect()


# Batches


def test_samples_join_along_their_first_dimension():
    model, samples = net_of("branches"), [torch.randn(2, 6) for _ in range(4)]
    walk = walk_over(model, samples, exact=True)
    for io in walk:
        outputs, exact = io.run_tensors(), io.run_tensors(exact=True)
        assert io.can_join()
        for stream, expected in ((False, outputs), (True, exact)):
            args, kwargs = io.batch([3, 1], exact=stream)
            joined = torch.cat([expected[3][0], expected[1][0]])
            torch.testing.assert_close(io.block.module(*args, **kwargs), joined)
        walk.advance([[x[0] * 2] for x in outputs], exact)


def test_tables_that_samples_share_are_not_joined_but_masks_of_their_own_are():
    model = MaskedStack([Masked() for _ in range(2)]).requires_grad_(False)
    io = next(iter(walk_of(model, [torch.randn(4, 6), torch.randn(4, 6)])))
    (x, mask), named = io.batch([0, 1])
    assert x.shape == (8, 6)
    assert mask.shape == (8, 1)
    assert named["scale"] == 0.5
    expected = [output[0] for output in io.run_tensors()]
    torch.testing.assert_close(io.block.module(x, mask, **named)[0], torch.cat(expected))


def test_masks_that_are_not_joined_must_be_the_same_for_all():
    def masked(m, x):
        return m.b(m.a(x, x[:, :1] * 0 + 1), x.sum(0))

    class Sum(nn.Linear):
        def forward(self, x, mask):
            return super().forward(x) * mask

    model = Net(masked, 2, lambda: Sum(6, 6))
    walk = walk_over(model, [torch.randn(4, 6), torch.randn(4, 6)])
    joined = []
    for io in walk:
        joined.append(io.can_join())
        walk.advance(io.run_tensors())
    assert joined == [True, False]


def test_samples_with_other_trailing_dimensions_do_not_join():
    model = Net(lambda m, x: m.b(m.a(x)), 2, nn.ReLU)
    io = next(iter(walk_over(model, [torch.randn(2, 6), torch.randn(2, 5), torch.randn(2, 6)])))
    assert not io.can_join()
    with pytest.raises(ValueError, match="different shapes"):
        io.batch([0, 1])
    assert io.batch([0, 2])[0][0].shape == (4, 6)


def test_samples_with_other_first_dimensions_are_not_of_one_shape():
    io = next(iter(walk_over(net_of("branches"), sampled())))
    assert not io.can_join()
    assert len(io) == 3


# Edges between blocks


def places(*texts):
    """`function`, `function.ordinal`, or `function<index` of the whole model."""
    found = []
    for text in texts:
        text, _, index = text.partition("<")
        name, _, ordinal = text.partition(".")
        found.append(
            Edge(Site("", 0, name, int(ordinal or 0)), "input" if index else "output", int(index or 0))
        )
    return found


EDGES = {
    "a sum": (branches, 3, places("add")),
    "a product and a sum": (branches, 3, places("mul", "add")),
    "a concatenation": (skip_around_everything, 3, places("cat")),
    "the image, where it is read": (image_again, 3, places("add<1", "add", "sub<1", "sub")),
    "both parts": (halves, 3, [Edge(Site("", 0, "chunk", 0), "output", i) for i in (0, 1)]),
    "functions in place": (in_place, 3, places("relu", "add", "setitem")),
    "a view written in place": (through_a_view, 2, places("relu")),
    "in front of the first block": (lambda m, x: m.b(m.a(x * 2 + x) + x), 2, places("mul", "add", "add.1")),
    "the image in front of the first block": (
        lambda m, x: m.b(m.a(x.reshape(-1, 6))),
        2,
        places("reshape<0"),
    ),
    "in place in front of the first block": (
        lambda m, x: m.b(m.a(x.relu_())),
        2,
        places("relu"),
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_between_blocks_are_calibrated_on_what_the_samples_have_there(name):
    forward, count, wanted = EDGES[name]
    model, samples, seen = Net(forward, count).requires_grad_(False), sampled(), {}
    before = passes(model, samples)

    def calibrate(edge, tensors):
        seen[edge] = [tensor.clone() for tensor in tensors]
        return lambda x: x.round() + 0.25

    walk = walk_over(model, samples, between=dict.fromkeys(wanted, calibrate), exact=True)
    found, exact = {}, {}
    for io in walk:
        plain = io.run_tensors(exact=True)
        io.block.module.weight.mul_(1.5)
        outputs = io.run_tensors()
        found[io.block.path], exact[io.block.path] = copied(outputs), copied(plain)
        walk.advance(outputs, plain)
    assert seen.keys() == set(wanted)
    assert all(len(tensors) == len(samples) for tensors in seen.values())
    after = passes(model, samples, {edge: lambda x: x.round() + 0.25 for edge in wanted})
    for path in found:
        assert_equal(found[path], after[path])
        assert_equal(exact[path], before[path])


def test_an_edge_is_calibrated_once_for_all_samples():
    calls = []

    def calibrate(edge, tensors):
        calls.append([len(tensor) for tensor in tensors])
        return torch.neg

    model, samples = net_of("branches"), sampled()
    walk = walk_over(model, samples, between={places("add")[0]: calibrate})
    for io in walk:
        walk.advance(io.run_tensors())
    assert calls == [[2, 3, 4]]
