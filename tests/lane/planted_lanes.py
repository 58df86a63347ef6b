"""Lanes to plant in outputs of networks, and checks that all small networks must pass."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map

from ptq_lane import Frame
from ptq_lane.scenes import Scenes
from ptqcore import trace

FRAME = Frame(192, 96)

sys.path.append(str(Path(__file__).parents[2] / "tools"))


def road_lanes(count, seed=5):
    """The lanes of rendered roads."""
    return [scene.lanes for scene in Scenes(count, seed)]


def stacked(targets):
    """Targets of images as a batch of tensors."""
    return {name: torch.from_numpy(np.stack([one[name] for one in targets])) for name in targets[0]}


def far_apart(found, wanted):
    """Of two sets of lanes of one image the largest distance of partners in their common rows, and the
    largest number of rows that only one of them has."""
    assert len(found) == len(wanted)
    distance, alone = [0.0], [0]
    for line in wanted.x:
        apart = np.abs(found.x - line)
        means = [np.nanmean(row) if np.isfinite(row).any() else np.inf for row in apart]
        partner = int(np.argmin(means))
        distance.append(np.nanmax(apart[partner]))
        alone.append(int((np.isnan(found.x[partner]) != np.isnan(line)).sum()))
    return max(distance), max(alone)


def check_views(adapter, outputs):
    """What is written into a group is written into the outputs, and into nothing else."""
    for name, head in adapter.heads(outputs).items():
        value = torch.full_like(head, 0.25)
        written = adapter.splice(outputs, {name: value})
        for other, now in adapter.heads(written).items():
            assert torch.equal(now, value if other == name else adapter.heads(outputs)[other])
        with torch.no_grad():
            copy = tree_map(torch.clone, outputs)
            adapter.heads(copy)[name].fill_(7.0)
            assert sum(bool((leaf == 7.0).all()) for leaf in copy.values()) == 1


def check_confidence(adapter, outputs):
    """0 to 1, one value for every position or for several."""
    heads, confidence = adapter.heads(outputs), adapter.confidence(outputs)
    assert confidence.keys() <= heads.keys()
    assert adapter.confidence_heads <= heads.keys()
    for name, value in confidence.items():
        assert torch.broadcast_shapes(value.shape, heads[name].shape) == heads[name].shape
        assert value.min() >= 0
        assert value.max() <= 1


def check_geometry(adapter, outputs, candidates):
    """Decoded lanes are the candidates with their slots; they count exactly in the rows they have."""
    x, weight = adapter.geometry(outputs)
    assert x.shape == weight.shape == (*candidates, len(adapter.frame.rows))
    assert bool(x.isfinite().all())
    for image, lanes in enumerate(adapter.decode(outputs)):
        for slot, line in zip(lanes.slots, lanes.x, strict=True):
            present = ~np.isnan(line)
            assert np.array_equal(weight[image, slot].numpy() > 0, present)
            np.testing.assert_allclose(x[image, slot].numpy()[present], line[present], rtol=1e-5, atol=1e-4)


def check_gradient(adapter, outputs, names):
    """Every number of the groups that a counting candidate is made of moves it."""
    outputs = {name: value.clone().requires_grad_() for name, value in outputs.items()}
    x, weight = adapter.geometry(outputs)
    torch.autograd.backward((x * weight.detach()).sum())
    for name in names:
        assert bool((outputs[name].grad != 0).any())


def check_trace(network):
    """Every module of the network is on its map, and gives the same again."""
    network.eval()
    images = torch.randn(2, 3, FRAME.height, FRAME.width, generator=torch.Generator().manual_seed(1))
    returned = []
    flow = trace(network, lambda: returned.append(network(images)))
    called = {call.path for call in flow.calls}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            assert name in called
    with torch.no_grad():
        again = network(images)
    assert all(torch.equal(again[name], value) for name, value in returned[0].items())


def check_onnx(network, folder):
    """ONNX Runtime gives what the network gives, at any batch."""
    onnxruntime = pytest.importorskip("onnxruntime")
    network.eval()
    shapes = ({0: "n"},)
    images = torch.randn(2, 3, FRAME.height, FRAME.width)
    program = torch.onnx.export(network, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(str(folder / "network.onnx"))
    session = onnxruntime.InferenceSession(str(folder / "network.onnx"))
    for count in (1, 3):
        images = torch.randn(count, 3, FRAME.height, FRAME.width)
        with torch.no_grad():
            expected = network(images)
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert len(found) == len(expected)
        for ours, theirs in zip(expected.values(), found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-3, atol=1e-4)
