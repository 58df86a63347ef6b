"""The partition into blocks, and the walk: replayed blocks give what the whole model gives."""

import pytest
import torch
from torch import nn

from ptqcore import Block, ModelError, QuantizedTensor, QuantLinear, QuantSpec
from ptqcore.blocks import find_blocks
from ptqcore.dataflow import tensors_in, trace
from ptqcore.modules import quantizable_layers
from ptqcore.walk import Walk


class Residual(nn.Module):
    """x + second(relu(first(x)))."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


class InPlace(Residual):
    """The first thing it does is to overwrite its own input."""

    def forward(self, x):
        x.mul_(0.5)
        return super().forward(x)


class Masked(Residual):
    """Takes positions and keywords and returns a tuple, like the layers of old transformers."""

    def forward(self, x, mask, scale=1.0, table=None):
        return super().forward(x * mask) * scale + table, mask.sum()


class Stack(nn.Module):
    """stem – layers, called one by one – mean over the rows – head."""

    def __init__(self, layers, width=6, classes=3):
        super().__init__()
        self.stem, self.layers = nn.Linear(width, width), nn.ModuleList(layers)
        self.head = nn.Linear(width, classes)

    def run_layers(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x):
        return self.head(self.run_layers(self.stem(x) * 2).mean(0))


class MaskedStack(Stack):
    def run_layers(self, x):
        mask = (torch.arange(x.shape[0]) % 2)[:, None].float()
        for layer in self.layers:
            x, _ = layer(x, mask, scale=0.5, table=self.stem.bias)
        return x


class KeywordStack(Stack):
    def run_layers(self, x):
        for layer in self.layers:
            x = layer(x=x)
        return x


class Branches(nn.Module):
    """Three layers side by side: nothing follows anything."""

    def __init__(self):
        super().__init__()
        self.left, self.middle, self.right = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.left(x) + self.middle(x) * self.right(x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def found(model, *excluded, glob=None):
    flow = trace(model, lambda: model(torch.randn(4, 6)))
    targets = set(quantizable_layers(model)) - set(excluded)
    return [block.path for block in find_blocks(model, flow, targets, glob)]


def blocks_of(model, sample):
    """The blocks without the stem and the head."""
    flow = trace(model, lambda: model(sample.clone()))
    return find_blocks(model, flow, set(quantizable_layers(model)) - {"stem", "head"})


def test_the_blocks_of_a_stack_are_its_layers():
    model = Stack([Residual() for _ in range(3)])
    assert found(model, "stem", "head") == ["layers.0", "layers.1", "layers.2"]


def test_the_blocks_of_a_sequential_are_its_members():
    assert found(nn.Sequential(*(Residual() for _ in range(3)))) == ["0", "1", "2"]


def test_layers_without_weights_belong_to_no_block():
    model = nn.Sequential(Residual(), nn.ReLU(), Residual())
    assert found(model) == ["0", "2"]


def test_one_layer_in_a_list_is_one_block():
    assert found(Stack([Residual()]), "stem", "head") == ["layers.0"]


def test_a_short_chain_without_a_residual_is_one_block():
    chains = [nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(2)]
    assert found(Stack(chains)) == ["stem", "layers.0", "layers.1", "head"]


def test_a_long_chain_is_split():
    assert found(nn.Sequential(nn.Sequential(*(nn.Linear(6, 6) for _ in range(4))))) == [
        f"0.{i}" for i in range(4)
    ]


def test_a_stack_inside_a_wrapper_is_found():
    model = nn.Sequential(Stack([Residual() for _ in range(3)]))
    assert found(model, "0.stem", "0.head") == ["0.layers.0", "0.layers.1", "0.layers.2"]


def test_two_stacks_are_walked_one_after_the_other():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = (Stack([Residual(), Residual()], classes=6) for _ in range(2))

        def forward(self, x):
            return self.large.run_layers(self.small.run_layers(x) * 2)

    assert found(Two(), "small.stem", "small.head", "large.stem", "large.head") == [
        "small.layers.0",
        "small.layers.1",
        "large.layers.0",
        "large.layers.1",
    ]


def test_branches_are_blocks_in_the_order_of_their_calls():
    assert found(Branches()) == ["left", "middle", "right"]


def test_what_is_called_twice_stays_in_one_block():
    shared = Residual()
    assert found(Stack([shared, shared]), "stem", "head") == [""]


def test_layers_beside_the_stack_are_blocks_of_their_own():
    layers = ["layers.0", "layers.1", "layers.2"]
    assert found(Stack([Residual() for _ in range(3)])) == ["stem", *layers, "head"]


def test_a_glob_names_the_blocks_instead():
    model = Stack([Residual() for _ in range(3)])
    assert found(model, glob="layers.[12]") == ["layers.1", "layers.2"]
    assert found(model, glob="stem") == ["stem"]


def test_the_star_of_a_glob_stays_on_one_level():
    assert found(Stack([Residual() for _ in range(2)]), glob="layers.*") == ["layers.0", "layers.1"]


def test_a_glob_that_matches_nothing_names_the_nearest():
    with pytest.raises(ModelError, match=r"'blocks' is 'layer\.0' and matches no module.*'layers\.0'"):
        found(Stack([Residual()]), glob="layer.0")


def test_a_glob_whose_block_is_called_twice_is_refused():
    shared = Residual()
    model = Stack([nn.Sequential(shared), nn.Sequential(shared)])
    with pytest.raises(ModelError, match=r"'layers\.0\.0' is called 2 times"):
        found(model, glob="layers.0.0")


def test_a_glob_that_matches_only_what_is_never_called_is_refused():
    with pytest.raises(ModelError, match="'blocks' is 'layers'"):
        found(Stack([Residual()]), glob="layers")


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


def last_block_outputs(model, block, samples):
    """What the last block returns in whole forward passes of the model as it now is."""
    seen = []
    handle = block.module.register_forward_hook(lambda _, args, output: seen.append(tensors_in(output)))
    with torch.no_grad():
        for sample in samples:
            model(sample.clone())
    handle.remove()
    return seen


def assert_equal(left, right):
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        assert len(ours) == len(theirs)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


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


def test_a_block_that_is_a_linear_layer_can_be_quantized():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    block = Block(model, "1")
    assert list(block.layers()) == ["1"]
    weight, bias = rounded(model[1].weight), model[1].bias
    layer = block.quantize_layer("1", weight, None)
    assert block.module is model[1] is layer
    assert isinstance(layer, QuantLinear)
    assert not block.layers()
    assert list(block.quantized_layers()) == ["1"]
    x = torch.randn(4, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, weight.dequantize(), bias))
    assert type(model[0]) is nn.Linear


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


def test_a_layer_inside_the_whole_model_block_can_be_quantized():
    model = Branches()
    Block(model, "").quantize_layer("middle", rounded(model.middle.weight), None)
    assert [type(layer) for layer in model.children()] == [nn.Linear, QuantLinear, nn.Linear]


def test_a_model_that_is_one_bare_layer_is_refused():
    model = nn.Linear(6, 6)
    with pytest.raises(ModelError, match="wrap it in a module"):
        Block(model, "").quantize_layer("", rounded(model.weight), None)


def test_a_layer_without_a_quantized_kind_is_refused():
    model = nn.Sequential(nn.LayerNorm(6))
    with pytest.raises(ModelError, match=r"'0' \(LayerNorm\) has no quantized kind"):
        Block(model, "0").quantize_layer("0", rounded(torch.randn(6, 6)), None)
