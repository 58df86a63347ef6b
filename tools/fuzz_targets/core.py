"""Recipes, artifacts, journals, checkpoints and ONNX files."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from fuzz_targets.target import Target
from ptqcore import (
    Block,
    Edge,
    QuantizedTensor,
    QuantSpec,
    Structure,
    artifact,
    read_checkpoint,
    write_tensors,
)
from ptqcore.attachments import AttachmentEntry, build_attachments
from ptqcore.checkpoints import put_weights
from ptqcore.dataflow import Site
from ptqcore.edges import ActivationQuantizers
from ptqcore.export.onnx_read import fixed_dimensions, largest_difference
from ptqcore.files import digest
from ptqcore.journal import BlockResult, Journal
from ptqcore.plan import make_plan
from ptqcore.plugin import Registry, discover
from ptqcore.recipe import read_recipe
from ptqcore.report.record import BlockRecord, LayerRecord
from ptqcore.tables import replace_by_table
from ptqcore.timesteps import Timesteps

WEIGHT = QuantSpec(bits=4, symmetric=False, granularity="group", group_size=4)
INPUT = QuantSpec(bits=8, symmetric=False)
OF_TIME = QuantSpec(bits=8, granularity="timestep", timesteps=3)
_RECIPE = """
name: seed
description: every section
seed: 3
task: {kind: classification, model: cifar-resnet-20, calibration: 4, preprocess: {size: [32, 32]}}
quant:
  weights: {bits: 4, granularity: channel, observer: mse}
  activations: {bits: 8, symmetric: false, observer: percentile}
  scope: dataflow
  first_last_bits: 8
  ignore: ["*.head"]
blocks: "layer*"
memory_gib: 1.5
steps:
  - equalize
  - adaround: {iterations: 20}
evaluate: {baseline: true}
export: [onnx-qdq]
"""


@cache
def _plugins() -> Registry:
    return discover()


class Net(nn.Module):
    """A convolution with a batch norm, a layer of time, and two linear layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.time = nn.Linear(8, 4)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.first.weight = self.second.weight

    def forward(self, x: Any, timestep: Any) -> Any:
        return x


def quantize_layer(
    model: nn.Module, path: str, layer: Any, weight: QuantSpec, inputs: QuantSpec | None
) -> None:
    """Round a layer to nearest; static inputs get the range from -1 to 1."""
    low, high = layer.weight.detach().flatten(1).aminmax(dim=1, keepdim=True)
    groups = 1 if weight.group_size is None else -(-layer.weight[0].numel() // weight.group_size)
    record = QuantizedTensor.from_range(
        layer.weight, low.expand(-1, groups), high.expand(-1, groups), weight
    )
    quantized = Block(model, path.rpartition(".")[0]).quantize_layer(path, record, inputs)
    if quantized.input_quantizer is not None and not quantized.input_quantizer.spec.dynamic:
        count = quantized.input_quantizer.spec.timesteps or 1
        quantized.input_quantizer.set_range(-torch.ones(count), torch.ones(count))


def _quantized() -> nn.Module:
    model = Net().eval()
    Structure(layers={}, folded={"norm": "convolution"}).build(model)
    quantize_layer(model, "convolution", model.convolution, QuantSpec(bits=3, granularity="channel"), INPUT)
    quantize_layer(model, "first", model.first, WEIGHT, OF_TIME)
    replace_by_table(model, "time", torch.rand(3, 4))
    entry = {"path": "second", "place": "input", "name": "llm:affine", "settings": {"channels": 8}}
    build_attachments(model, [AttachmentEntry.model_validate(entry)], _plugins().attachment)
    edge = Edge(Site("", 0, "add", 0), "output", 0)
    quantizers = ActivationQuantizers({edge: INPUT})
    quantizers.attach(model)
    for quantizer in quantizers.children():
        quantizer.set_range(torch.zeros(1), torch.ones(1))  # type: ignore[operator]
    Timesteps.of([0, 1, 2], "timestep").attach(model)
    return model


def write_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(_RECIPE)


def plan_recipe(folder: Path) -> None:
    """As `ptq recipe show` does."""
    make_plan(read_recipe(folder / "recipe.yaml"), "vision", _plugins()).resolved.to_yaml()


def write_artifact(folder: Path) -> None:
    artifact.save(_quantized(), folder, "vision", "none", "0")


def read_artifact(folder: Path) -> None:
    artifact.restore(folder, lambda _: Net(), _plugins().attachment)


def mend_artifact(folder: Path) -> None:
    """The checksum of the manifest, if there still is one."""
    _mend(folder / artifact.MANIFEST_FILE, folder / artifact.MODEL_FILE)


def _mend(description: Path, tensors: Path) -> None:
    try:
        content = json.loads(description.read_text())
        content["sha256"] = digest(tensors)
        description.write_text(json.dumps(content))
    except (OSError, ValueError, TypeError, RecursionError):
        return


def _block() -> Block:
    torch.manual_seed(0)
    return Block(nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4, bias=False))), "0")


def write_journal(folder: Path) -> None:
    block = _block()
    quantize_layer(block.model, "0.0", block.model.get_submodule("0.0"), WEIGHT, INPUT)
    entry = {"path": "0.1", "place": "input", "name": "llm:affine", "settings": {"channels": 8}}
    build_attachments(block.model, [AttachmentEntry.model_validate(entry)], _plugins().attachment)
    layer = LayerRecord("0.0", "0", (8, 8), "int4", None, 0.1, 0.0, (0.0, 1.0), (0.0, 1.0))
    result = BlockResult(BlockRecord("0", 0.1, 1.0, 10, (3.0, 2.0)), [layer])
    journal = Journal(folder, {"recipe": "1"}, False, _plugins().attachment)
    journal.save(0, block, result, {"a.scale": torch.ones(1)})


def read_journal(folder: Path) -> None:
    journal, block = Journal(folder, {"recipe": "1"}, True, _plugins().attachment), _block()
    if journal.has(0, block):
        journal.restore(0, block)


def mend_journal(folder: Path) -> None:
    _mend(folder / "block-0000.json", folder / "block-0000.safetensors")


def _network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 2))


def write_safetensors(folder: Path) -> None:
    write_tensors(folder / "weights.safetensors", _network().state_dict())


def write_torch(folder: Path) -> None:
    torch.save({"state_dict": _network().state_dict(), "epoch": 3}, folder / "weights.pth")


def write_torch_legacy(folder: Path) -> None:
    state = _network().half().state_dict()
    torch.save({"model": state}, folder / "weights.tar", _use_new_zipfile_serialization=False)


def read_weights(folder: Path) -> None:
    (file,) = folder.iterdir()
    put_weights(_network(), {key: value.float() for key, value in read_checkpoint(file).items()}, file)


class Product(nn.Module):
    """One linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 4)


@cache
def _product() -> nn.Module:
    model = Product()
    quantize_layer(model, "layer", model.layer, QuantSpec(bits=8, granularity="channel"), None)
    return model


def write_onnx(folder: Path) -> None:
    """A Gemm whose weight is dequantized, reshaped and transposed."""
    layer: Any = _product().layer
    codes = (layer.quantized_weight.codes.numpy().astype(np.int16) - 128).astype(np.int8)
    constants = {
        "codes": codes,
        "scale": layer.weight_scale.flatten().numpy(),
        "shape": np.array([4, 8], np.int64),
        "bias": layer.bias.detach().numpy(),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["floats"], axis=0),
        helper.make_node("Reshape", ["floats", "shape"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["columns"], perm=[1, 0]),
        helper.make_node("Gemm", ["x", "columns", "bias"], ["y"], name="layer#0"),
    ]
    shape: dict[str, list[Any]] = {"x": ["batch", 8], "y": ["batch", 4]}
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name, sides in shape.items()
    ]
    given = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "seed", values[:1], values[1:], given)
    onnx.save(
        helper.make_model(graph),
        str(folder / "model.onnx"),
        save_as_external_data=True,
        location="data.bin",
        size_threshold=64,
    )


def read_onnx(folder: Path) -> None:
    fixed_dimensions(folder / "model.onnx", {"x": {0: "batch"}})
    largest_difference(folder / "model.onnx", _product())


TARGETS = (
    Target("recipe", write_recipe, plan_recipe),
    Target("artifact", write_artifact, read_artifact, mend_artifact),
    Target("journal", write_journal, read_journal, mend_journal),
    Target("safetensors-checkpoint", write_safetensors, read_weights),
    Target("torch-checkpoint", write_torch, read_weights),
    Target("torch-legacy-checkpoint", write_torch_legacy, read_weights),
    Target("onnx", write_onnx, read_onnx),
)
