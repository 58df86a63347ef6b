"""Language models as ONNX files: engines compute the logits of the artifact."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_lm
import torch
from torch import nn

import ptqcore
from ptq_llm.onnx_matmulnbits import OnnxMatMulNBits
from ptqcore import ExportError, QuantLinear, QuantSection, Recipe
from ptqcore.engines import execute
from ptqcore.export import onnx as core_export

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-4  # of the largest logit
STEPS = 127  # to the largest logit, in an EngineRecord
WINDOW = 24
Q_PROJ = "model.layers.0.self_attn.q_proj"


def groups(bits, size, **others):
    return {"bits": bits, "granularity": "group", "group_size": size, **others}


W8A8 = {"weights": {"granularity": "channel"}, "activations": {"symmetric": False}}
PACKED = {
    "w4-signed": {"weights": groups(4, 32, signed_scale=True)},
    "w4-asymmetric": {"weights": groups(4, 16, symmetric=False)},
    "w8": {"weights": groups(8, 64)},
    "w2-asymmetric": {"weights": groups(2, 64, symmetric=False)},
}
INTEGER = {"w8a8-layers": W8A8, "w8a8-dataflow": W8A8 | {"scope": "dataflow"}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Name of a scheme, architecture → a finished run: its record, its ONNX file, its artifact's model."""
    base = tmp_path_factory.mktemp("onnx")
    for seed, name in enumerate(("text", "calibration")):
        tiny_lm.write_text(base / name, 200, seed)

    @cache
    def finished(scheme, architecture="llama"):
        model = tiny_lm.save(base / architecture, architecture, num_hidden_layers=2, layer_types=None)
        exporter = "onnx-matmulnbits" if scheme in PACKED else "onnx-qdq"
        task = {"kind": "causal-lm", "model": str(model), "window": WINDOW, "max_windows": 2}
        task |= {"text": str(base / "text"), "calibration": str(base / "calibration")}
        task |= {"calibration_window": WINDOW, "calibration_samples": 3}
        recipe = {"name": "tiny", "task": task, "quant": (PACKED | INTEGER)[scheme], "steps": ["round"]}
        folder = base / f"{scheme}-{architecture}"
        record = ptqcore.quantize(Recipe.model_validate(recipe | {"export": [exporter]}), "llm", folder)
        file = folder / "exports" / exporter / "model.onnx"
        return SimpleNamespace(
            record=record.exports[exporter], file=file, model=ptqcore.load(folder).eval()
        )

    return finished


def tokens(batch, length):
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(length))


def logits(found, ids, engine="onnxruntime"):
    """Of the artifact, and of its file in an engine."""
    with torch.no_grad():
        ours = found.model(input_ids=ids, use_cache=False).logits.numpy()
    (theirs,) = execute(engine, found.file, [{"input_ids": ids.numpy()}]).outputs
    return ours, theirs["output"]


def engine(found, name="onnxruntime"):
    (record,) = (one for one in found.record.engines if one.engine == name)
    assert not record.problem
    return record


def quantized(found):
    return {name: layer for name, layer in found.model.named_modules() if isinstance(layer, QuantLinear)}


class TestPackedWeights:
    @pytest.mark.parametrize("scheme", PACKED)
    def test_engines_give_the_logits_of_the_artifact(self, scheme, run):
        found = run(scheme)
        assert found.record.verified
        assert found.record.largest_difference == 0
        for name in ("onnxruntime", "openvino"):
            record = engine(found, name)
            assert record.samples == 3
            assert record.largest_steps / STEPS <= TOLERANCE
            assert record.agreement == 1

    @pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "mixtral"])
    def test_biases_and_experts_too(self, architecture, run):
        found = run("w4-asymmetric", architecture)
        assert found.record.largest_difference == 0
        assert engine(found).largest_steps / STEPS <= TOLERANCE
        products = {node.name for node in onnx.load(found.file).graph.node if node.op_type == "MatMulNBits"}
        assert products == quantized(found).keys()

    @pytest.mark.parametrize("scheme", PACKED)
    def test_onnxruntime_unpacks_the_very_weights_of_the_record(self, scheme, run):
        # A product with the unit matrix is the weight: sums of one number and zeros are exact.
        found = run(scheme)
        graph = onnx.load(found.file).graph
        constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
            layer = quantized(found)[node.name]
            alone = onnx.NodeProto()
            alone.CopyFrom(node)
            alone.input[0], alone.output[0] = "x", "y"
            ends = [
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, size])
                for name, size in (("x", layer.in_features), ("y", layer.out_features))
            ]
            held = [constants[name] for name in node.input[1:]]
            single = onnx.helper.make_model(
                onnx.helper.make_graph([alone], "one", ends[:1], ends[1:], held),
                opset_imports=[onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid(node.domain, 1)],
                ir_version=10,
            )
            session = runtime.InferenceSession(single.SerializeToString())
            (weight,) = session.run(None, {"x": np.eye(layer.in_features, dtype=np.float32)})
            assert np.array_equal(weight.T, layer.weight.numpy())

    def test_negative_scales_are_kept(self, run):
        found = run("w4-signed")
        (scale,) = (
            onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load(found.file).graph.initializer
            if tensor.name == f"{Q_PROJ}.weight.scale"
        )
        assert scale.min() < 0 < scale.max()

    @pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 40)])
    @pytest.mark.parametrize("architecture", ["llama", "qwen2"])
    def test_any_batch_and_length_gives_the_logits_of_the_artifact(self, architecture, shape, run):
        ours, theirs = logits(run("w4-asymmetric", architecture), tokens(*shape))
        assert np.abs(theirs - ours).max() <= TOLERANCE * np.abs(ours).max()
        assert np.array_equal(theirs.argmax(-1), ours.argmax(-1))

    def test_the_graph_maps_tokens_to_logits_and_sums_in_float(self, run):
        graph = onnx.load(run("w4-signed").file).graph
        sizes = {
            value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }
        assert sizes == {
            "input_ids": ["batch", "sequence"],
            "output": ["batch", "sequence", tiny_lm.VOCABULARY],
        }
        for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
            assert node.domain == "com.microsoft"
            assert {one.name: one.i for one in node.attribute}.keys() == {"K", "N", "bits", "block_size"}
            assert len(node.input) == 3  # zero points of 2^(bits-1) are the default

    def test_large_models_keep_their_constants_beside_the_file(self, run, tmp_path, monkeypatch):
        found = run("w4-asymmetric")
        monkeypatch.setattr(core_export, "_LARGEST_FILE", 1000)
        task = SimpleNamespace(
            open_dimensions={"input_ids": {1: "sequence"}},
            class_dimension=-1,
            forward=lambda model, sample: model(**sample),
            timestep=lambda sample: None,
        )
        samples = [{"input_ids": tokens(1, WINDOW), "use_cache": False}]
        OnnxMatMulNBits().export(found.model, task, samples, tmp_path)
        assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
        verified = OnnxMatMulNBits().verify(found.model, task, samples, tmp_path)
        assert verified.largest_difference == 0
        assert verified.engines[0].largest_steps / STEPS <= TOLERANCE
        assert verified.engines[0].agreement == 1


class TestWholeNumbers:
    @pytest.mark.parametrize("scheme", INTEGER)
    @pytest.mark.parametrize("architecture", ["llama", "qwen2"])
    def test_every_quantized_layer_runs_in_integers(self, architecture, scheme, run):
        found = run(scheme, architecture)
        assert found.record.largest_difference == 0
        for name in ("onnxruntime", "openvino"):
            record = engine(found, name)
            assert {path: record.layers[path] for path in quantized(found)} == dict.fromkeys(
                quantized(found)
            )
            # A value that lies on the edge of a step falls to either side, and moves others.
            assert record.within_one_step > 0.95
            assert record.agreement > 0.95

    @pytest.mark.parametrize("scheme", INTEGER)
    def test_any_batch_and_length_gives_the_tokens_of_the_artifact(self, scheme, run):
        for shape in ((1, 5), (3, 40)):
            ours, theirs = logits(run(scheme, "qwen2"), tokens(*shape))
            apart = np.abs(theirs - ours) / (np.abs(ours).max() / STEPS)
            assert (apart <= 1).mean() > 0.95
            assert (theirs.argmax(-1) == ours.argmax(-1)).mean() > 0.95


def section(**weights):
    return QuantSection.model_validate({"weights": weights})


@pytest.mark.parametrize(
    ("quant", "sentence"),
    [
        (section(**groups(3, 32)), "quant.weights.bits is 3: set it to one of these"),
        (section(dtype="e4m3"), "quant.weights.dtype is e4m3: set it to int"),
        (section(bits=4, granularity="channel"), "quant.weights.granularity is channel: set it to group"),
        (section(**groups(4, 48)), "quant.weights.group_size is 48: set it to 16, 32, 64 or 128"),
        (section(**groups(4, 8)), "quant.weights.group_size is 8: set it to 16, 32, 64 or 128"),
        (
            QuantSection.model_validate(W8A8 | {"weights": groups(8, 32)}),
            "set quant.activations to null, or export onnx-qdq",
        ),
    ],
)
def test_what_the_operator_cannot_hold_is_one_sentence(quant, sentence):
    with pytest.raises(ExportError) as caught:
        OnnxMatMulNBits().check(quant)
    assert str(caught.value).startswith("export onnx-matmulnbits ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (
            nn.Linear(80, 8),
            "cannot hold head: its 80 inputs are not a multiple of quant.weights.group_size 32",
        ),
        (nn.Conv2d(32, 8, 1), "linear layers only, and head is a Conv2d: add it to quant.ignore"),
        (nn.Linear(64, 8).half(), "the weight of head is torch.float16: load the model in float32"),
    ],
)
def test_layers_that_the_operator_cannot_hold_are_named(layer, sentence):
    OnnxMatMulNBits().check_layers(section(**groups(4, 32)), {"head": nn.Linear(64, 8)})
    with pytest.raises(ExportError, match=sentence):
        OnnxMatMulNBits().check_layers(section(**groups(4, 32)), {"head": layer})


class TestReadBack:
    @pytest.fixture
    def changed(self, run, tmp_path):
        """Edits the graph of an export → the difference that is found in the changed file."""

        def difference(edit, architecture="llama"):
            found = run("w4-asymmetric", architecture)
            model = onnx.load(found.file)
            edit(model.graph)
            onnx.save(model, tmp_path / "model.onnx")
            return OnnxMatMulNBits().difference(tmp_path / "model.onnx", found.model), found.model

        return difference

    def edit(self, name, change):
        def edit(graph):
            (tensor,) = (tensor for tensor in graph.initializer if tensor.name == name)
            array = onnx.numpy_helper.to_array(tensor).copy()
            change(array)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))

        return edit

    def test_sees_one_changed_bit_of_a_code(self, changed):
        def flip(codes):
            codes[3, 2, 1] ^= 0b00010000  # the lowest bit of column 2 · 16 + 3 of row 3

        difference, model = changed(self.edit(f"{Q_PROJ}.weight.codes", flip))
        scale = float(model.get_submodule(Q_PROJ).weight_scale[3, 2])
        assert difference == pytest.approx(max(1, scale))

    @pytest.mark.parametrize("key", ["weight.scale", "weight.zero_point"])
    def test_sees_a_changed_grid(self, key, changed):
        def change(array):
            array[0] += array.dtype.type(1)

        difference, _ = changed(self.edit(f"{Q_PROJ}.{key}", change))
        assert difference > 0

    def test_sees_a_changed_bias(self, changed):
        def change(array):
            array[0] += np.float32(0.25)

        difference, _ = changed(self.edit(f"{Q_PROJ}.bias", change), "qwen2")
        assert difference == pytest.approx(0.25, abs=1e-6)

    def test_names_a_missing_layer(self, changed):
        def rename(graph):
            for node in graph.node:
                if node.name == Q_PROJ:
                    node.name = "other"

        with pytest.raises(ExportError, match=f"layer {Q_PROJ} is missing in model.onnx"):
            changed(rename)

    def test_names_a_tensor_of_another_shape(self, changed):
        def cut(graph):
            (tensor,) = (one for one in graph.initializer if one.name == f"{Q_PROJ}.weight.scale")
            array = onnx.numpy_helper.to_array(tensor)[1:]
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

        with pytest.raises(ExportError, match=r"q_proj\.weight\.scale has the shape \[255\]"):
            changed(cut)
