"""What the exporters of GPTQ and AWQ refuse, and what they find wrong in files that they read back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import GROUP, Q_PROJ, export, quantize, read_back, tiny_llama
from torch import nn

from ptq_llm.awq_format import AWQ
from ptq_llm.gptq_format import GPTQ, GPTQv2
from ptqcore import ExportError, QuantLinear, QuantSection, QuantSpec

ALL = [GPTQ, GPTQv2, AWQ]
HALF = {"scale_dtype": "float16"}
INT4, UINT4 = (QuantSpec(bits=4, symmetric=symmetric, **GROUP, **HALF) for symmetric in (True, False))
ACTIVATIONS = {"granularity": "token", "dynamic": True}
G4 = {"bits": 4, **GROUP}

REFUSED = {
    "gptq-activations": (GPTQ, G4, {"activations": ACTIVATIONS}, "activations int8 .* to null"),
    "gptq-float": (GPTQ, {"dtype": "e4m3", "granularity": "channel"}, {}, "weights.dtype e4m3: .* to int"),
    "gptq-bits": (GPTQ, {"bits": 5, **GROUP}, {}, "weights.bits 5: set it to 2, 3, 4 or 8"),
    "gptq-tensor": (GPTQv2, {"bits": 4}, {}, "weights.granularity tensor: set it to channel or group"),
    "gptq-size": (GPTQ, G4 | {"group_size": 48}, {}, "weights.group_size 48: set it to 16, 32, 64"),
    "gptq-first": (GPTQ, G4, {"first_last_bits": 6}, "first_last_bits 6: set it to 2, 3, 4 or 8"),
    "awq-activations": (AWQ, G4, {"activations": ACTIVATIONS}, "activations int8 .* to null"),
    "awq-bits": (AWQ, {"bits": 8, **GROUP}, {}, "weights.bits 8: set it to 4$"),
    "awq-channel": (
        AWQ,
        {"bits": 4, "granularity": "channel"},
        {},
        "weights.granularity channel: set",
    ),
    "awq-size": (AWQ, G4 | {"group_size": 256}, {}, "weights.group_size 256: set it to 16, 32, 64 or 128"),
    "awq-first": (AWQ, G4, {"first_last_bits": 8}, "first_last_bits 8: set it to 4$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_check_names_the_key_that_the_format_cannot_hold(case):
    exporter, weights, others, message = REFUSED[case]
    quant = QuantSection.model_validate({"weights": weights, **others})
    with pytest.raises(ExportError, match=f"^export {exporter.name} cannot hold quant.{message}"):
        exporter().check(quant)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("exporter", [GPTQ, GPTQv2])
def test_check_lets_pass_what_gptq_holds(exporter, bits, symmetric):
    for grid in (GROUP, {"granularity": "channel"}):
        weights = {"bits": bits, "symmetric": symmetric, **grid}
        exporter().check(QuantSection.model_validate({"weights": weights}))


@pytest.mark.parametrize("fields", [{"symmetric": True}, {"symmetric": False}, {"signed_scale": True}])
def test_check_lets_pass_what_awq_holds(fields):
    AWQ().check(QuantSection.model_validate({"weights": G4 | fields}))


PLACE = "model.layers.0.mlp.up_proj"
LAYERS = {
    "ragged": (ALL, PLACE, nn.Linear(80, 64), "its 80 inputs are not a multiple of .*group_size 32"),
    "gptq-outputs": ([GPTQ, GPTQv2], PLACE, nn.Linear(64, 40), "its 40 outputs are not a multiple of 32"),
    "awq-outputs": ([AWQ], PLACE, nn.Linear(64, 36), "its 36 outputs are not a multiple of 8"),
    "head": (ALL, "lm_head", nn.Linear(64, 64), r"lm_head is in none: add it to quant\.ignore"),
    "convolution": (ALL, PLACE, nn.Conv2d(3, 4, 3), "holds linear layers only"),
}


@pytest.mark.parametrize("case", LAYERS)
def test_check_layers_names_a_layer_that_does_not_fit(case):
    exporters, name, layer, message = LAYERS[case]
    quant = QuantSection.model_validate({"weights": G4 | HALF})
    for exporter in exporters:
        with pytest.raises(ExportError, match=f"export {exporter.name}.*{message}"):
            exporter().check_layers(quant, {name: layer})


def test_check_layers_wants_inputs_that_fill_words_of_gptq():
    quant = QuantSection.model_validate({"weights": G4 | HALF | {"group_size": 16}})
    GPTQ().check_layers(quant, {PLACE: nn.Linear(64, 64)})
    with pytest.raises(ExportError, match="its 48 inputs are not a multiple of 32"):
        GPTQ().check_layers(quant, {PLACE: nn.Linear(48, 64)})
    AWQ().check_layers(quant, {PLACE: nn.Linear(48, 64)})


@pytest.mark.parametrize("exporter", ALL)
def test_float32_scales_are_refused_before_anything_is_quantized(exporter):
    layers = {PLACE: nn.Linear(64, 64)}
    with pytest.raises(ExportError, match=r"quant\.weights\.scale_dtype null .*float32: set it to float16"):
        exporter().check_layers(QuantSection.model_validate({"weights": G4}), layers)
    exporter().check_layers(QuantSection.model_validate({"weights": G4 | HALF}), layers)
    layers[PLACE].half()
    exporter().check_layers(QuantSection.model_validate({"weights": G4}), layers)


@pytest.mark.parametrize("exporter", ALL)
def test_export_refuses_scales_that_float16_would_change(exporter, tmp_path):
    model = quantize(tiny_llama(), QuantSpec(bits=4, **GROUP))
    with pytest.raises(ExportError, match=f"{Q_PROJ}: set quant.weights.scale_dtype to float16"):
        export(model, tmp_path, exporter)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", [2.0**-30, 1e6])
def test_export_refuses_scales_outside_of_float16(scale, tmp_path):
    model = quantize(tiny_llama(dtype=torch.bfloat16), QuantSpec(bits=4, **GROUP))
    model.get_submodule(Q_PROJ).weight_scale[3, 1] = scale
    with pytest.raises(ExportError, match=f"changes those of {Q_PROJ}"):
        export(model, tmp_path, GPTQ)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_refuses_the_zero_point_0_and_version_2_keeps_it(bits, tmp_path):
    model = quantize(tiny_llama(), UINT4.model_copy(update={"bits": bits}))
    model.get_submodule(Q_PROJ).weight_zero_point[5, 1] = 0
    with pytest.raises(ExportError, match=f"the 0 among those of {Q_PROJ}: replace it by gptq-v2"):
        export(model, tmp_path, GPTQ)
    export(model, tmp_path, GPTQv2)
    assert read_back(model, tmp_path, GPTQv2) == 0.0


@pytest.mark.parametrize("exporter", ALL)
def test_export_refuses_what_only_single_layers_have(exporter, tmp_path):
    model = quantize(tiny_llama(), INT4)
    model.get_submodule(Q_PROJ).ensure_bias()
    with pytest.raises(ExportError, match=f"a step gave {Q_PROJ} a bias"):
        export(model, tmp_path, exporter)
    model = quantize(tiny_llama(), INT4, QuantSpec(**ACTIVATIONS), within=Q_PROJ)
    with pytest.raises(ExportError, match=f"the inputs of {Q_PROJ} are quantized"):
        export(model, tmp_path, exporter)
    model = quantize(quantize(tiny_llama(), INT4.model_copy(update={"bits": 6}), within=Q_PROJ), INT4)
    with pytest.raises(ExportError, match=r"cannot hold quant\.weights\.bits 6"):
        export(model, tmp_path, exporter)
    with pytest.raises(ExportError, match="lm_head is in none"):
        export(quantize(tiny_llama(), INT4, within=""), tmp_path, exporter)
    with pytest.raises(ExportError, match="no quantized layer"):
        export(tiny_llama(), tmp_path, exporter)
    assert not list(tmp_path.iterdir())


class TestVerifyGPTQ:
    @pytest.fixture
    def model(self, tmp_path):
        model = quantize(tiny_llama(), UINT4)
        export(model, tmp_path, GPTQv2)
        return model

    def change(self, folder, edit):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    @pytest.mark.parametrize("kind", ["qweight", "qzeros"])
    def test_sees_one_changed_bit_of_a_word(self, kind, model, tmp_path):
        def flip(tensors):
            tensors[f"{Q_PROJ}.{kind}"][-1, -1] ^= 1

        self.change(tmp_path, flip)
        scales = model.get_submodule(Q_PROJ).weight_scale[:, -1]
        difference = read_back(model, tmp_path, GPTQv2)
        assert any(difference == pytest.approx(float(scale), rel=1e-5) for scale in scales)

    def test_sees_a_changed_group(self, model, tmp_path):
        def move(tensors):
            tensors[f"{Q_PROJ}.g_idx"][0] = 1

        self.change(tmp_path, move)
        assert read_back(model, tmp_path, GPTQv2) > 0

    def test_refuses_a_group_that_is_not_there(self, model, tmp_path):
        def move(tensors):
            tensors[f"{Q_PROJ}.g_idx"][0] = 2

        self.change(tmp_path, move)
        with pytest.raises(ExportError, match=r"g_idx names groups 0 … 2 of 2"):
            read_back(model, tmp_path, GPTQv2)

    def test_sees_a_configuration_of_another_version(self, model, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"gptq_v2"', '"gptq"'))
        largest = max(
            module.weight_scale.max() for module in model.modules() if isinstance(module, QuantLinear)
        )
        assert read_back(model, tmp_path, GPTQv2) == pytest.approx(float(largest), rel=1e-5)

    @pytest.mark.parametrize("kind", ["qweight", "qzeros", "scales", "g_idx"])
    def test_names_a_missing_tensor(self, kind, model, tmp_path):
        self.change(tmp_path, lambda tensors: tensors.pop(f"{Q_PROJ}.{kind}"))
        with pytest.raises(ExportError, match=rf"tensor {Q_PROJ}\.{kind} is missing"):
            read_back(model, tmp_path, GPTQv2)

    def test_names_a_tensor_that_does_not_belong(self, model, tmp_path):
        self.change(tmp_path, lambda tensors: tensors.update({"weight_codes": torch.zeros(1)}))
        with pytest.raises(ExportError, match="tensor weight_codes is in the file"):
            read_back(model, tmp_path, GPTQv2)

    def test_names_a_layer_that_config_json_leaves_out(self, model, tmp_path):
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["dynamic"] = {r"-:.*\.0\.self_attn\.q_proj": {}}
        path.write_text(json.dumps(config))
        with pytest.raises(ExportError, match=f"does not say how layer {Q_PROJ} is quantized"):
            read_back(model, tmp_path, GPTQv2)
