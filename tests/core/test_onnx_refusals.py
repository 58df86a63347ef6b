"""What the ONNX exporter refuses, in which words, and how it reads its files back."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_onnx import ACTIVATIONS, REGISTRY, WEIGHTS, export, model_file
from tiny_networks import NETWORKS, TinyOptions, TinyTask
from torch import nn

import ptqcore
from ptqcore import ExportError, QuantSection
from ptqcore.engines import execution
from ptqcore.export.onnx import OnnxQDQ
from ptqcore.report import engines
from ptqcore.report.record import EngineRecord

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FP8 = {"dtype": "e4m3"}
GROUPS = {"granularity": "group", "group_size": 4}


@pytest.mark.parametrize(
    ("quant", "sentence"),
    [
        ({"weights": FP8}, "quant.weights.dtype is e4m3: set it to int"),
        ({"weights": WEIGHTS, "activations": FP8}, "quant.activations.dtype is e4m3: set it to int"),
        (
            {"weights": WEIGHTS, "activations": {"dynamic": True, "granularity": "token"}},
            "quant.activations.dynamic is true: set it to false",
        ),
        (
            {"weights": GROUPS, "activations": ACTIVATIONS, "scope": "dataflow"},
            "set quant.weights.granularity to channel, or quant.activations to null",
        ),
        (
            {"weights": WEIGHTS, "activations": {"signed_scale": True}, "scope": "dataflow"},
            "set quant.activations.signed_scale to false",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_one_sentence(quant, sentence):
    with pytest.raises(ExportError) as caught:
        OnnxQDQ().check(QuantSection.model_validate(quant))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_groups_are_for_linear_layers():
    quant = QuantSection.model_validate({"weights": GROUPS})
    OnnxQDQ().check_layers(quant, {"head": nn.Linear(8, 8)})
    with pytest.raises(ExportError, match=r"stem is a Conv2d: set quant.weights.granularity"):
        OnnxQDQ().check_layers(quant, {"stem": nn.Conv2d(8, 8, 3)})


def test_convolutions_in_groups_and_transposed_ones_need_the_grids_of_their_outputs():
    quant = QuantSection.model_validate({"weights": WEIGHTS, "activations": ACTIVATIONS})
    OnnxQDQ().check_layers(quant, {"head": nn.Linear(8, 8), "stem": nn.Conv2d(8, 8, 3)})
    with pytest.raises(ExportError, match=r"stem, a Conv2d in groups, .* set quant.scope to dataflow"):
        OnnxQDQ().check_layers(quant, {"stem": nn.Conv2d(8, 8, 3, groups=2)})
    with pytest.raises(ExportError, match=r"up, a ConvTranspose2d, .* set quant.scope to dataflow"):
        OnnxQDQ().check_layers(quant, {"up": nn.ConvTranspose2d(8, 8, 2)})


def test_half_precision_is_refused():
    quant = QuantSection.model_validate({"weights": WEIGHTS})
    with pytest.raises(ExportError, match=r"the weight of head is torch.float16"):
        OnnxQDQ().check_layers(quant, {"head": nn.Linear(8, 8).half()})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("ptqcore.export.onnx.find_spec", lambda _: None)
    with pytest.raises(ExportError, match=r"pip install 'ptqcore\[onnx\]'"):
        OnnxQDQ().check(QuantSection.model_validate({"weights": WEIGHTS}))


def test_a_model_without_quantized_layers_is_refused(tmp_path):
    with pytest.raises(ExportError, match="no quantized layer"):
        OnnxQDQ().export(nn.Linear(2, 2), None, [torch.ones(1, 2)], tmp_path)


def test_the_exporter_is_found_by_its_name():
    assert REGISTRY.find("exporters", "onnx-qdq", "tiny") is OnnxQDQ


class TestReadBack:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        export("residual", tmp_path)
        return tmp_path

    def verify(self, folder: Path):
        model = ptqcore.load(folder, NETWORKS["residual"]().eval())
        task = TinyTask(TinyOptions(network="residual"), 0, folder)
        return OnnxQDQ().verify(model, task, task.samples(model)[:2], model_file(folder).parent)

    def change(self, folder: Path, edit) -> None:
        model = onnx.load(model_file(folder))
        edit(model.graph)
        onnx.save(model, model_file(folder))

    def tensor(self, graph, name: str):
        (found,) = (tensor for tensor in graph.initializer if tensor.name == name)
        return found

    def test_sees_one_changed_code(self, folder):
        def flip(graph):
            tensor = self.tensor(graph, "first.weight.codes")
            codes = onnx.numpy_helper.to_array(tensor).copy()
            codes[3, 2, 1, 0] ^= 1
            tensor.CopyFrom(onnx.numpy_helper.from_array(codes, tensor.name))

        self.change(folder, flip)
        scales = self.tensor(onnx.load(model_file(folder)).graph, "first.weight.scale")
        scale = float(onnx.numpy_helper.to_array(scales)[3])
        assert self.verify(folder).largest_difference == pytest.approx(scale, rel=1e-5)

    def test_sees_a_changed_bias(self, folder):
        def add(graph):
            tensor = self.tensor(graph, "first.bias.codes")
            codes = onnx.numpy_helper.to_array(tensor) + np.int32(2)
            tensor.CopyFrom(onnx.numpy_helper.from_array(codes, tensor.name))

        self.change(folder, add)
        assert self.verify(folder).largest_difference > 0

    def test_names_a_missing_layer(self, folder):
        def rename(graph):
            for node in graph.node:
                if node.name == "second":
                    node.name = "other"

        self.change(folder, rename)
        with pytest.raises(ExportError, match=r"layer second is missing in model\.onnx"):
            self.verify(folder)

    def test_an_engine_that_is_missing_or_fails_is_a_line_of_the_report(self, folder, monkeypatch):
        monkeypatch.setattr(execution, "find_spec", lambda _: None)
        found = self.verify(folder)
        assert found.largest_difference == 0
        assert [engine.engine for engine in found.engines] == ["onnxruntime", "openvino"]
        for engine in found.engines:
            assert "is not installed: pip install" in engine.problem
            assert "not compared" in engines.sentence(engine)
            assert engines.warning(engine) == ""

    def test_another_scale_of_an_activation_shows_in_the_outputs(self, folder):
        def narrow(graph):
            for tensor in graph.initializer:
                if tensor.name.startswith("act") and tensor.name.endswith("scale"):
                    small = onnx.numpy_helper.to_array(tensor) * np.float32(0.25)
                    tensor.CopyFrom(onnx.numpy_helper.from_array(small, tensor.name))

        self.change(folder, narrow)
        found = next(one for one in self.verify(folder).engines if one.engine == "onnxruntime")
        assert found.within_one_step < 0.999
        assert "are expected" in engines.warning(found)


def test_sentences_of_an_engine():
    layers = {"first": None, "second": "its output is not quantized"}
    histogram = {"≤ 1": 0.99995, "> 1": 0.00005}
    record = EngineRecord("onnxruntime", "", layers, 4, 0.99995, 2.0, histogram, 1.0)
    assert engines.sentence(record) == (
        "onnxruntime: 1 of 2 layers in integers; 99.99 % of outputs within one step, top-1 agreement 100 %"
    )
    assert engines.warning(record) == ""


def test_an_engine_is_not_asked_for_more_than_the_simulation_repeats():
    record = EngineRecord("onnxruntime", within_one_step=0.95, histogram={"≤ 1": 1.0}, control=0.955)
    assert engines.warning(record) == ""
    assert "(95.5 % of the simulation's own)" in engines.sentence(record)
