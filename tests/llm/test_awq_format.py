"""AWQ files against words worked out by hand, a reader that goes number by number, and others' readers."""

import json
import sys
from types import ModuleType

import pytest
import torch
from compressed_tensors.entrypoints.convert import convert_checkpoint
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loader import awq_weight, load_plain, random_layer
from safetensors.torch import load_file, save_file
from tiny_llama import GROUP, Q_PROJ, export, quantize, read_back, tiny_llama, verify
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AwqConfig, CompressedTensorsConfig, Starcoder2Config
from transformers.integrations.awq import replace_quantization_scales

from ptq_llm.awq_format import AWQ
from ptqcore import ExportError, QuantLinear, QuantSpec

INT4 = QuantSpec(bits=4, scale_dtype="float16", **GROUP)
UINT4 = INT4.model_copy(update={"symmetric": False})
SCHEMES = {
    "asymmetric": UINT4,
    "symmetric": INT4,
    "signed-scale": INT4.model_copy(update={"signed_scale": True}),
    "groups-of-16": UINT4.model_copy(update={"group_size": 16}),
}


def logits(model: nn.Module) -> Tensor:
    tokens = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def test_a_word_holds_eight_outputs_of_one_input_even_ones_first():
    layer = random_layer(UINT4, 16, 32)
    # Output o has the code o mod 16 for every input: nibbles 0, 2, 4, 6, 1, 3, 5, 7, the first one lowest.
    layer.weight_codes.copy_(
        torch.arange(16)[:, None] * 0x11111111 - (torch.arange(16)[:, None] > 7) * 2**32
    )
    layer.weight_zero_point.copy_(torch.arange(15, -1, -1)[:, None])
    tensors = AWQ().layer_tensors(layer)
    words = [0x75316420, 0xFDB9ECA8 - 2**32]
    assert tensors["qweight"].tolist() == [words] * 32
    assert tensors["qzeros"].tolist() == [[0x8ACE9BDF - 2**32, 0x02461357]]


def test_zero_words_of_a_symmetric_grid():
    zeros = AWQ().layer_tensors(random_layer(INT4, 16, 64))["qzeros"]
    assert zeros.tolist() == [[0x88888888 - 2**32] * 2] * 2


def test_a_layers_tensors_have_the_documented_names_types_and_shapes():
    tensors = AWQ().layer_tensors(random_layer(UINT4, 24, 64))
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == {
        "qweight": (torch.int32, [64, 3]),
        "qzeros": (torch.int32, [2, 3]),
        "scales": (torch.float16, [2, 24]),
    }


@given(
    symmetric=st.booleans(),
    group_size=st.sampled_from([16, 32, 64]),
    eights=st.integers(1, 5),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_a_reader_that_goes_number_by_number_finds_the_weight(symmetric, group_size, eights, groups, seed):
    spec = QuantSpec(bits=4, symmetric=symmetric, granularity="group", group_size=group_size)
    layer = random_layer(spec, 8 * eights, groups * group_size, seed)
    named = {f"layer.{name}": tensor.contiguous() for name, tensor in AWQ().layer_tensors(layer).items()}
    assert torch.equal(awq_weight(named, "layer", group_size), layer.weight.double())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_files_read_back_give_the_logits_of_the_model(scheme, tied, tmp_path):
    spec = SCHEMES[scheme]
    model = quantize(tiny_llama(tied), spec)
    export(model, tmp_path, AWQ)
    assert read_back(model, tmp_path, AWQ) == 0.0
    loaded = load_plain(tmp_path, lambda tensors, name: awq_weight(tensors, name, spec.group_size))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_a_model_in_half_precision_read_back_bit_for_bit(dtype, tmp_path):
    model = quantize(tiny_llama(dtype=dtype), UINT4)
    export(model, tmp_path, AWQ)
    assert read_back(model, tmp_path, AWQ) == 0.0
    assert len(verify(model, tmp_path, AWQ).notes) == (dtype != torch.float16)
    loaded = load_plain(tmp_path, lambda tensors, name: awq_weight(tensors, name, 32))
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_converts_the_files_to_what_transformers_loads(scheme, tmp_path):
    model = quantize(tiny_llama(dtype=torch.float16), SCHEMES[scheme])
    (tmp_path / "awq").mkdir()
    export(model, tmp_path / "awq", AWQ)
    converter = AutoAWQConverter.from_pretrained(tmp_path / "awq")
    convert_checkpoint(tmp_path / "awq", tmp_path / "converted", converter, max_workers=1, device="cpu")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "converted", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(loaded.get_submodule(name).weight, layer.weight)
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_config_json_is_the_tasks_with_the_documented_key(tmp_path):
    model = quantize(tiny_llama(tied=True), UINT4, within="self_attn")
    export(model, tmp_path, AWQ)
    assert read_back(model, tmp_path, AWQ) == 0.0
    config = json.loads((tmp_path / "config.json").read_text())
    kept = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(2) for kind in ("gate", "up", "down")]
    quantization = config.pop("quantization_config")
    assert quantization == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": [*kept, "lm_head"],
    }
    assert config == json.loads(model.config.to_json_string(use_diff=True))
    read = AwqConfig.from_dict(quantization)
    assert (read.bits, read.group_size, read.zero_point, read.format) == (4, 32, True, "gemm")
    assert read.modules_to_not_convert == [*kept, "lm_head"]


class ScaledActivation(nn.Module):
    """What GPTQModel has transformers put in place of an activation."""

    def __init__(self, module: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act, self.scales = module, nn.Parameter(scales)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) / self.scales


@pytest.fixture
def starcoder():
    config = Starcoder2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=128,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_activations_that_transformers_replaces_have_scales_of_one(starcoder, monkeypatch, tmp_path):
    model = quantize(starcoder, UINT4)
    export(model, tmp_path, AWQ)
    assert read_back(model, tmp_path, AWQ) == 0.0
    stub = ModuleType("gptqmodel.quantization.awq.modules.act")
    stub.ScaledActivation = ScaledActivation
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    tensors = load_file(tmp_path / "model.safetensors")
    plain = set(model.state_dict())
    replaced = replace_quantization_scales(model, "starcoder2")
    added = {name: value for name, value in replaced.state_dict().items() if name not in plain}
    assert len(added) == 2
    for name, ones in added.items():
        assert torch.equal(tensors[name], ones)


def test_layers_of_two_group_sizes_are_refused(tmp_path):
    model = quantize(tiny_llama(), SCHEMES["groups-of-16"], within="0.self_attn.v_proj")
    with pytest.raises(ExportError, match=r"0\.self_attn\.q_proj has 32 and .*v_proj has 16: give"):
        export(quantize(model, UINT4), tmp_path, AWQ)


def test_one_changed_bit_is_seen(tmp_path):
    model = quantize(tiny_llama(), UINT4)
    export(model, tmp_path, AWQ)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{Q_PROJ}.qweight"][5, 3] ^= 1 << 20  # nibble 5 of word 3: output 8 * 3 + 3 of input 5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    scale = model.get_submodule(Q_PROJ).weight_scale[27, 0]
    assert read_back(model, tmp_path, AWQ) == pytest.approx(float(scale), rel=1e-5)


def test_a_layer_that_readers_would_leave_out_is_named(tmp_path):
    model = quantize(tiny_llama(), UINT4)
    export(model, tmp_path, AWQ)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"lm_head"', '"0.mlp.up"'))
    with pytest.raises(ExportError, match="lm_head is quantized, but it is not"):
        read_back(model, tmp_path, AWQ)
    path.write_text(path.read_text().replace('"0.mlp.up"', '"lm_head", "0.mlp.up"'))
    with pytest.raises(ExportError, match=r"does not say how layer model\.layers\.0\.mlp\.up_proj is"):
        read_back(model, tmp_path, AWQ)
