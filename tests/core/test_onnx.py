"""Small networks, quantized and exported: engines compute what the simulation computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_networks import CHANNELS, NETWORKS, PLUGIN, SIZE, TinyTask

import ptqcore
from ptqcore import Recipe, quantize
from ptqcore.engines import execute
from ptqcore.export import onnx as onnx_export
from ptqcore.export import parity
from ptqcore.plugin import Installed, Registry
from ptqcore.report.record import EngineRecord, ExportRecord

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

REGISTRY = Registry([Installed("tiny", "tiny", "0", PLUGIN)])
WEIGHTS, ACTIVATIONS = {"granularity": "channel"}, {"symmetric": False}


def export(network: str, folder: Path, batch: int = 1, **quant) -> ExportRecord:
    """Quantize a network with the recipe key `quant` and export it."""
    sections = {"scope": "dataflow", "weights": WEIGHTS, "activations": ACTIVATIONS} | quant
    recipe = {
        "name": network,
        "task": {"kind": "tiny", "network": network, "batch": batch},
        "quant": sections,
        "steps": ["round"],
        "export": ["onnx-qdq"],
    }
    record = quantize(Recipe.model_validate(recipe), "tiny", folder, registry=REGISTRY)
    return record.exports["onnx-qdq"]


def engine(record: ExportRecord, name: str = "onnxruntime") -> EngineRecord:
    (found,) = (one for one in record.engines if one.engine == name)
    assert not found.problem
    return found


def model_file(folder: Path) -> Path:
    return folder / "exports" / "onnx-qdq" / "model.onnx"


def graph(folder: Path):
    return onnx.load(model_file(folder)).graph


def kinds(folder: Path) -> list[str]:
    return [node.op_type for node in graph(folder).node]


def noise(batch: int) -> dict[str, np.ndarray]:
    return {"image": torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(9)).numpy()}


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_runs_in_integers_within_a_step_of_the_simulation(network, tmp_path):
    record = export(network, tmp_path)
    assert record.verified
    assert record.largest_difference == 0
    for name in ("onnxruntime", "openvino"):
        found = engine(record, name)
        assert found.layers
        assert set(found.layers.values()) == {None}
        assert found.within_one_step == 1
        assert sum(found.histogram.values()) == pytest.approx(1)
        assert found.agreement is None or found.agreement > 0.99
    assert not record.notes


@pytest.mark.parametrize("network", ["residual", "pooled", "upsampled", "smooth"])
def test_the_file_takes_any_batch(network, tmp_path):
    export(network, tmp_path)
    model = ptqcore.load(tmp_path, NETWORKS[network]().eval())
    samples = [noise(1), noise(3)]
    execution = execute("onnxruntime", model_file(tmp_path), samples)
    for sample, outputs in zip(samples, execution.outputs, strict=True):
        with torch.no_grad():
            expected = model(torch.from_numpy(sample["image"])).numpy()
        step = np.abs(expected).max() / 127
        assert np.abs(outputs["output"] - expected).max() <= step


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_few_bits_of_weights_and_activations_are_the_same_numbers(bits, tmp_path):
    record = export(
        "residual", tmp_path, weights=WEIGHTS | {"bits": bits}, activations=ACTIVATIONS | {"bits": bits}
    )
    found = engine(record)
    assert set(found.layers.values()) == {None}
    assert found.within_one_step == 1
    assert "Clip" in kinds(tmp_path)


@pytest.mark.parametrize("network", ["residual", "pooled", "concat", "tokens"])
def test_symmetric_activations_and_weights_with_a_zero_point_are_the_same_numbers(network, tmp_path):
    record = export(
        network, tmp_path, weights=WEIGHTS | {"symmetric": False}, activations={"symmetric": True}
    )
    found = engine(record)
    assert found.within_one_step == 1
    assert set(found.layers.values()) == {None}


def test_zero_points_of_weights_are_taken_into_codes_of_few_bits(tmp_path):
    weights = WEIGHTS | {"bits": 4, "symmetric": False}
    record = export("residual", tmp_path, weights=weights)
    assert record.largest_difference == 0
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph(tmp_path).initializer}
    assert not stored["first.weight.zero_point"].any()
    for name in ("onnxruntime", "openvino"):  # OpenVINO computes with no other zero point
        assert set(engine(record, name).layers.values()) == {None}


@pytest.mark.parametrize("network", ["residual", "smooth"])
def test_convolutions_with_the_grids_of_their_inputs_alone_are_products_of_windows(network, tmp_path):
    record = export(network, tmp_path, scope="layers")
    assert record.largest_difference == 0
    for name in ("onnxruntime", "openvino"):
        found = engine(record, name)
        assert set(found.layers.values()) == {None}
        assert found.within_one_step == 1


def test_sums_behind_layers_are_of_what_was_rounded(tmp_path):
    found = engine(export("residual", tmp_path), "openvino")
    assert found.largest_steps < 0.1  # it would leave the rounding out


def test_relu_and_clipping_are_left_to_the_quantizers(tmp_path):
    export("pooled", tmp_path)
    assert {"Relu", "Clip"}.isdisjoint(kinds(tmp_path))


def test_means_over_height_and_width_are_global_pools(tmp_path):
    for network in ("pooled", "mean-head"):
        export(network, tmp_path / network)
        assert "GlobalAveragePool" in kinds(tmp_path / network)
        assert "ReduceMean" not in kinds(tmp_path / network)


def test_a_layer_left_alone_stays_in_floating_point(tmp_path):
    record = export("chain", tmp_path, ignore=["second"])
    found = engine(record)
    assert found.layers["first"] is None
    assert found.layers["third"] is None
    (reason,) = (reason for name, reason in found.layers.items() if name.startswith("second"))
    assert reason is not None
    assert found.within_one_step == 1
    assert "Min" in kinds(tmp_path)


def test_a_shared_layer_is_stored_once(tmp_path):
    export("shared", tmp_path)
    names = [tensor.name for tensor in graph(tmp_path).initializer]
    assert names.count("again.weight.codes") == 1
    assert {node.name for node in graph(tmp_path).node if node.op_type == "Conv"} == {
        "stem",
        "again",
        "again#1",
    }


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ({"bits": 4, "granularity": "group", "group_size": 4}, "INT4"),
        ({"bits": 4, "granularity": "group", "group_size": 4, "symmetric": False}, "INT4"),
        ({"bits": 8, "granularity": "group", "group_size": 8}, "INT8"),
        ({"bits": 4, "granularity": "channel"}, "INT4"),
        ({"bits": 6, "granularity": "tensor"}, "INT8"),
    ],
)
@pytest.mark.parametrize("scope", ["layers", "dataflow"])
def test_weights_alone_are_kept_in_narrow_integers(spec, kind, scope, tmp_path):
    record = export("tokens", tmp_path, weights=spec, activations=None, scope=scope)
    assert record.largest_difference == 0
    types = {tensor.name: tensor.data_type for tensor in graph(tmp_path).initializer}
    assert onnx.TensorProto.DataType.Name(types["wide.weight.codes"]) == kind
    assert "QuantizeLinear" not in kinds(tmp_path)
    for name in ("onnxruntime", "openvino"):  # neither rounds the float inputs
        assert engine(record, name).largest_steps < 0.1


def test_convolutions_with_weights_alone_are_the_same_numbers(tmp_path):
    record = export("upsampled", tmp_path, activations=None, scope="layers")
    assert record.largest_difference == 0
    assert engine(record).within_one_step == 1


def test_linear_layers_run_in_integers_with_the_grids_of_their_inputs_alone(tmp_path):
    record = export("tokens", tmp_path, scope="layers")
    assert record.largest_difference == 0
    for name in ("onnxruntime", "openvino"):
        found = engine(record, name)
        assert set(found.layers.values()) == {None}
        assert found.within_one_step == 1


@pytest.mark.parametrize("scope", ["layers", "dataflow"])
def test_dimensions_that_the_task_leaves_open_take_any_size(scope, tmp_path, monkeypatch):
    monkeypatch.setattr(TinyTask, "open_dimensions", {"tokens": {1: "length"}})
    record = export("tokens", tmp_path, scope=scope)
    assert not record.notes
    model = ptqcore.load(tmp_path, NETWORKS["tokens"]().eval())
    tokens, other = torch.randn(3, 9, CHANNELS), torch.randn(3, 1, CHANNELS)
    (outputs,) = execute(
        "onnxruntime", model_file(tmp_path), [{"tokens": tokens.numpy(), "other": other.numpy()}]
    ).outputs
    with torch.no_grad():
        expected = model(tokens, other)
    for name, ours in zip(("output_0", "output_1"), expected, strict=True):
        step = float(ours.abs().max()) / 127
        assert np.abs(outputs[name] - ours.numpy()).max() <= step
    sizes = [
        size.dim_param or size.dim_value for size in graph(tmp_path).output[1].type.tensor_type.shape.dim
    ]
    assert sizes == ["batch", "length", CHANNELS]


def test_a_dimension_that_cannot_be_left_open_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyTask, "open_dimensions", {"tokens": {2: "width"}})
    record = export("tokens", tmp_path)
    assert record.notes == (f"takes tokens with a width of {CHANNELS} only",)
    assert engine(record).within_one_step == 1


def test_large_models_keep_their_constants_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_LARGEST_FILE", 1000)
    record = export("residual", tmp_path)
    assert record.largest_difference == 0
    assert engine(record).within_one_step == 1
    assert model_file(tmp_path).with_name("model.onnx.data").stat().st_size > 1000


def test_few_samples_are_compared_where_their_outputs_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "_MOST_VALUES", 3 * 2 * 5 * CHANNELS)  # two outputs of 5 x CHANNELS
    found = engine(export("tokens", tmp_path))
    assert found.samples == 3
    assert found.within_one_step == 1


def test_inputs_and_outputs_have_the_names_of_the_model(tmp_path):
    export("tokens", tmp_path)
    found = graph(tmp_path)
    assert [value.name for value in found.input] == ["tokens", "other"]
    assert [value.name for value in found.output] == ["output_0", "output_1"]
    sizes = found.input[0].type.tensor_type.shape.dim
    assert [size.dim_param or size.dim_value for size in sizes] == ["batch", 5, CHANNELS]


def test_nothing_is_stored_twice_and_nothing_tells_of_the_machine(tmp_path):
    export("residual", tmp_path)
    model = onnx.load(model_file(tmp_path))
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    large = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in large} == {onnx.TensorProto.INT8}
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [
        ("ptqcore", ptqcore.__version__)
    ]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path.cwd()).encode() not in model_file(tmp_path).read_bytes()


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for run in ("first", "second"):
        export("nearest", tmp_path / run)
    assert model_file(tmp_path / "first").read_bytes() == model_file(tmp_path / "second").read_bytes()
