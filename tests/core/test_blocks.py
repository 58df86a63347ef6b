"""The partition into blocks."""

import pytest
import torch
from stacks import Residual, Stack
from torch import nn

from ptqcore import Block, ModelError, QuantizedTensor, QuantLinear, QuantSpec
from ptqcore.blocks import find_blocks
from ptqcore.dataflow import trace
from ptqcore.modules import quantizable_layers


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
