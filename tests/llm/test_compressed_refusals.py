"""What the exporter refuses to write, and what it finds wrong in a file that it reads back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import (
    ASYMMETRIC,
    CHANNEL4,
    GROUP,
    INT4,
    INT8,
    Q_PROJ,
    TOKEN,
    WEIGHT_ONLY,
    WITH_INPUTS,
    export,
    quantize,
    read_back,
    tiny_llama,
)
from torch import nn

from ptq_llm.compressed_tensors import CompressedTensors
from ptqcore import ExportError, QuantConv2d, QuantLinear, QuantSection, QuantSpec


class TestVerify:
    @pytest.fixture
    def model(self, tmp_path):
        model = quantize(tiny_llama(), QuantSpec(bits=4, symmetric=False, **GROUP))
        export(model, tmp_path)
        return model

    def change(self, folder, edit):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    @pytest.mark.parametrize("kind", ["weight_packed", "weight_zero_point"])
    def test_sees_one_changed_bit_of_a_word(self, kind, model, tmp_path):
        def flip(tensors):
            tensors[f"{Q_PROJ}.{kind}"][-1, -1] ^= 1

        self.change(tmp_path, flip)
        group_scales = model.get_submodule(Q_PROJ).weight_scale[:, -1]
        difference = read_back(model, tmp_path)
        assert any(difference == pytest.approx(float(scale)) for scale in group_scales)

    def test_sees_a_changed_tensor_that_is_not_quantized(self, model, tmp_path):
        self.change(tmp_path, lambda tensors: tensors["model.norm.weight"][3].add_(0.25))
        assert read_back(model, tmp_path) == 0.25

    @pytest.mark.parametrize("name", [f"{Q_PROJ}.weight_scale", "model.embed_tokens.weight"])
    def test_names_a_missing_tensor(self, name, model, tmp_path):
        self.change(tmp_path, lambda tensors: tensors.pop(name))
        with pytest.raises(ExportError, match=f"tensor {name} is missing"):
            read_back(model, tmp_path)

    def test_names_a_tensor_of_another_shape(self, model, tmp_path):
        name = f"{Q_PROJ}.weight_packed"
        self.change(tmp_path, lambda tensors: tensors.update({name: tensors[name][:, 1:].contiguous()}))
        with pytest.raises(ExportError, match=rf"tensor {name} has shape \[64, 7\] .* not \[64, 8\]"):
            read_back(model, tmp_path)

    def test_names_a_tensor_that_does_not_belong(self, model, tmp_path):
        self.change(tmp_path, lambda tensors: tensors.update({"weight_codes": torch.zeros(1)}))
        with pytest.raises(ExportError, match="tensor weight_codes is in the file"):
            read_back(model, tmp_path)

    @pytest.mark.parametrize(
        ("wrong", "what"),
        [('"num_bits": 6', "weight"), ('"dynamic": false', "input"), ('"strategy": "tensor"', "input")],
    )
    def test_names_a_grid_that_config_json_has_otherwise(self, wrong, what, tmp_path):
        """Engines round inputs as config.json says: no number in the file would show it."""
        model = quantize(tiny_llama(), CHANNEL4, QuantSpec(**TOKEN))
        export(model, tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["weights" if what == "weight" else "input_activations"] |= json.loads(f"{{{wrong}}}")
        path.write_text(json.dumps(config))
        with pytest.raises(ExportError, match=f"config.json says that the grid of the {what} of .*proj is"):
            read_back(model, tmp_path)

    def test_names_a_layer_that_config_json_would_quantize(self, model, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"lm_head"', ""))
        with pytest.raises(ExportError, match="lm_head is quantized, but it is not"):
            read_back(model, tmp_path)

    def test_refuses_a_file_that_is_no_safetensors_file(self, model, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"no")
        with pytest.raises(ExportError, match="cannot be read back"):
            read_back(model, tmp_path)


REFUSED = {
    "weights.dtype e5m2": ({"dtype": "e5m2"}, None),
    "activations.dtype e5m2": ({"dtype": "e4m3"}, {"dtype": "e5m2", **TOKEN}),
    "activations.scale_dtype float16 with dynamic true": ({}, {"scale_dtype": "float16", **TOKEN}),
}


@pytest.mark.parametrize("key", REFUSED)
def test_check_names_the_key_that_the_format_cannot_hold(key, tmp_path):
    weights, activations = REFUSED[key]
    quant = QuantSection.model_validate({"weights": weights, "activations": activations})
    with pytest.raises(ExportError, match=rf"cannot hold quant\.{key}.*set"):
        CompressedTensors().check(quant)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [*((spec, None) for spec in (*WEIGHT_ONLY.values(), *ASYMMETRIC.values())), *WITH_INPUTS.values()],
)
def test_check_lets_pass_what_was_seen_to_load(weights, activations):
    inputs = None if activations is None else activations.model_dump()
    quant = QuantSection.model_validate({"weights": weights.model_dump(), "activations": inputs})
    CompressedTensors().check(quant)


def test_check_refuses_activations_between_functions():
    quant = QuantSection.model_validate({"weights": {}, "activations": {}, "scope": "dataflow"})
    with pytest.raises(
        ExportError, match=r"quant\.scope is dataflow: set it to layers, or export onnx-qdq"
    ):
        CompressedTensors().check(quant)


def test_check_layers_refuses_groups_that_do_not_fill_a_row_or_an_input():
    quant = QuantSection.model_validate({"weights": {"bits": 4, **GROUP}})
    with pytest.raises(ExportError, match=r"down: its 80 inputs .* quant\.weights\.group_size 32"):
        CompressedTensors().check_layers(quant, {"down": nn.Linear(80, 8)})
    inputs = {"dynamic": True, "granularity": "group", "group_size": 48}
    quant = QuantSection.model_validate({"weights": {"bits": 4, **GROUP}, "activations": inputs})
    with pytest.raises(ExportError, match=r"down: its 64 inputs .* quant\.activations\.group_size 48"):
        CompressedTensors().check_layers(quant, {"down": nn.Linear(64, 8)})


def widths(bits, **quant):
    """A section, and the grids of layers of these widths."""
    section = QuantSection.model_validate({"weights": {"bits": 4, **GROUP}} | quant)
    return section, {f"layer{width}": section.weights.model_copy(update={"bits": width}) for width in bits}


def test_check_grids_refuses_packed_zero_points_of_several_widths():
    asymmetric = {"weights": {"bits": 4, "symmetric": False, **GROUP}}
    exporter = CompressedTensors()
    with pytest.raises(ExportError, match=r"symmetric false where layer4 and layer3 have different grids"):
        exporter.check_grids(*widths([4, 3], **asymmetric))
    exporter.check_grids(*widths([4], **asymmetric))
    exporter.check_grids(*widths([2, 3, 8]))
    exporter.check_grids(*widths([4, 3], **asymmetric, activations=TOKEN))


def test_export_refuses_packed_zero_points_beside_another_grid(tmp_path):
    asymmetric = QuantSpec(bits=4, symmetric=False, **GROUP)
    model = quantize(quantize(tiny_llama(), asymmetric, within="mlp"), INT4, within="self_attn")
    with pytest.raises(
        ExportError, match=r"symmetric false where .*mlp.* and .*self_attn.* have different"
    ):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_export_refuses_groups_that_do_not_fill_a_row(tmp_path):
    model = quantize(tiny_llama(intermediate=80), INT4)
    with pytest.raises(ExportError, match=r"layers\.0\.mlp\.down_proj: its 80 inputs .*group_size 32"):
        export(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_export_refuses_a_quantized_output_layer_that_is_tied(tmp_path):
    with pytest.raises(ExportError, match=r"add lm_head to quant\.ignore"):
        export(quantize(tiny_llama(tied=True), INT4, within=""), tmp_path)


def test_export_refuses_an_input_without_a_range(tmp_path):
    model = quantize(tiny_llama(), INT8)
    layer = nn.Linear(64, 64, bias=False)
    model.set_submodule(Q_PROJ, QuantLinear(layer, INT8, QuantSpec()))
    with pytest.raises(ExportError, match=f"the input of {Q_PROJ} has no calibrated range"):
        export(model, tmp_path)


def test_export_refuses_layers_that_are_not_linear(tmp_path):
    model = quantize(tiny_llama(), INT8)
    model.add_module("vision", QuantConv2d(nn.Conv2d(3, 4, 3), INT8, None))
    with pytest.raises(ExportError, match="linear layers only, and vision is not one"):
        export(model, tmp_path)


def test_export_refuses_a_bias_that_the_architecture_has_not(tmp_path):
    model = quantize(tiny_llama(), INT8)
    model.get_submodule(Q_PROJ).ensure_bias()
    with pytest.raises(ExportError, match=f"a step gave {Q_PROJ} a bias"):
        export(model, tmp_path)


def test_export_refuses_a_model_without_quantized_layers(tmp_path):
    with pytest.raises(ExportError, match="no quantized layer"):
        export(tiny_llama(), tmp_path)
