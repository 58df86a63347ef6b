"""What the GGUF exporter refuses to write, and what it finds wrong in a file that it reads back."""

import pytest
import tiny_lm
import torch
from gguf import GGUFReader
from tiny_gguf import (
    BLOCKS,
    FILE,
    Q4_0,
    Q4_1,
    Q8_0,
    byte_level_tokenizer,
    export,
    quantized,
    task,
    verify,
)
from tiny_llama import quantize
from torch import nn

import ptqcore
from ptq_llm.causal_lm import CausalLM
from ptq_llm.gguf_export import GGUF
from ptq_llm.gguf_tokenizer import PROBE
from ptqcore import ExportError, QuantConv2d, QuantLinear, QuantSection, QuantSpec

Q_PROJ = "model.layers.0.self_attn.q_proj"


def section(weights, **others):
    return QuantSection.model_validate({"weights": weights} | others)


class TestCheck:
    @pytest.mark.parametrize(
        ("key", "weights"),
        [
            ("dtype e4m3", {"dtype": "e4m3"}),
            ("bits 3", {"bits": 3, **BLOCKS}),
            ("bits 5", {"bits": 5, "symmetric": False, **BLOCKS}),
            ("symmetric false with bits 8", {"bits": 8, "symmetric": False, **BLOCKS}),
            ("group_size 16", {"bits": 4, "granularity": "group", "group_size": 16}),
            ("group_size 48", {"bits": 4, "granularity": "group", "group_size": 48}),
        ],
    )
    def test_names_the_key_that_no_block_holds(self, key, weights):
        with pytest.raises(ExportError, match=rf"cannot hold quant\.weights\.{key}: .*set it to"):
            GGUF().check(section(weights))

    def test_refuses_quantized_inputs(self):
        inputs = {"granularity": "token", "dynamic": True}
        with pytest.raises(ExportError, match=r"cannot hold quant\.activations: .*set it to null"):
            GGUF().check(section({"bits": 4, **BLOCKS}, activations=inputs))

    def test_refuses_other_bits_of_first_and_last_layers(self):
        asymmetric = {"bits": 4, "symmetric": False, **BLOCKS}
        with pytest.raises(ExportError, match=r"quant\.first_last_bits 8: .*set it to 4$"):
            GGUF().check(section(asymmetric, first_last_bits=8))
        GGUF().check(section({"bits": 4, **BLOCKS}, first_last_bits=8))

    @pytest.mark.parametrize("spec", [Q4_0, Q4_1, Q8_0, QuantSpec(bits=4, granularity="channel")])
    def test_lets_pass_what_was_seen_to_load(self, spec):
        GGUF().check(section(spec.model_dump()))

    def test_refuses_rows_that_blocks_do_not_fill(self):
        per_channel = section({"bits": 4, "granularity": "channel"})
        with pytest.raises(ExportError, match="down: its 80 inputs are not a multiple of 32"):
            GGUF().check_layers(per_channel, {"down": nn.Linear(80, 8)})
        in_groups = section({"bits": 4, "granularity": "group", "group_size": 64})
        with pytest.raises(ExportError, match=r"96 inputs .* multiple of quant\.weights\.group_size 64"):
            GGUF().check_layers(in_groups, {"down": nn.Linear(96, 8)})

    def test_refuses_layers_that_are_not_linear(self):
        with pytest.raises(ExportError, match="linear layers only, and vision is not one"):
            GGUF().check_layers(section(Q8_0.model_dump()), {"vision": nn.Conv2d(3, 4, 3)})

    def test_asks_for_float16_scales_unless_the_weights_are_float16(self):
        quant = section({"bits": 4, "granularity": "group", "group_size": 32})
        with pytest.raises(ExportError, match=r"scale_dtype null: .* set it to float16"):
            GGUF().check_layers(quant, {"up": nn.Linear(32, 8)})
        GGUF().check_layers(quant, {"up": nn.Linear(32, 8).half()})
        GGUF().check_layers(section(Q4_0.model_dump()), {"up": nn.Linear(32, 8)})


ROPES = [
    ("llama", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
    ("qwen2", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    ("llama", {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5, "rope_theta": 1e4}),
]


class TestCheckModel:
    """What is known of a model before anything is quantized."""

    def refused(self, model, sentence, tokenizer=None):
        with pytest.raises(ExportError, match=sentence):
            GGUF().check_model(model, task(model, tokenizer or tiny_lm.tokenizer()), {})

    def test_lets_pass_what_export_writes(self):
        for architecture in ("llama", "mistral", "qwen2", "qwen3"):
            model = tiny_lm.build(architecture)
            GGUF().check_model(model, task(model, tiny_lm.tokenizer()), {})

    def test_refuses_another_architecture(self):
        self.refused(tiny_lm.build("olmo2"), "model_type 'olmo2': it writes llama, mistral, qwen2, qwen3")

    def test_refuses_a_tensor_that_the_format_has_no_name_for(self):
        model = tiny_lm.build("qwen3", attention_bias=True)
        self.refused(model, r"have no place for model\.layers\.0\.self_attn\.q_proj\.bias")

    @pytest.mark.parametrize(("architecture", "rope"), ROPES)
    def test_refuses_rotations_that_readers_do_not_compute(self, architecture, rope):
        self.refused(tiny_lm.build(architecture, rope_parameters=rope), "cannot hold rope_parameters")

    def test_refuses_another_activation_function(self):
        self.refused(tiny_lm.build(hidden_act="gelu"), "hidden_act gelu: readers .* compute silu")

    def test_refuses_a_tokenizer_that_has_no_name_in_the_format(self):
        tokenizer = byte_level_tokenizer("[aeiou]", text=PROBE * 2)
        model = tiny_lm.build(vocab_size=len(tokenizer))
        self.refused(model, "splits text by a rule that is not one of", tokenizer)

    def test_a_run_ends_before_anything_is_quantized(self, tmp_path, monkeypatch):
        folder = tiny_lm.save(tmp_path / "model", "olmo2")
        recipe = tiny_lm.recipe(folder, tmp_path, {"weights": Q4_0.model_dump()}, export=["gguf"])
        monkeypatch.setattr(CausalLM, "evaluate", lambda *_: pytest.fail("the model was measured"))
        with pytest.raises(ExportError, match="model_type 'olmo2'"):
            ptqcore.quantize(recipe, "llm", tmp_path / "out")


class TestExport:
    def refused(self, model, folder, sentence):
        with pytest.raises(ExportError, match=sentence):
            export(model, folder)
        assert not list(folder.iterdir())

    def test_refuses_a_scale_that_float16_cannot_hold(self, tmp_path):
        spec = QuantSpec(bits=4, granularity="group", group_size=32)
        sentence = rf"{Q_PROJ}: float16 cannot hold its scale 0\.\d+, set quant\.weights\.scale_dtype"
        self.refused(quantized(spec=spec), tmp_path, sentence)

    def test_names_the_layer_of_another_grid(self, tmp_path):
        spec = QuantSpec(bits=3, **BLOCKS)
        model = quantize(quantize(tiny_lm.build(), spec, within="1.mlp.up"), Q4_0)
        self.refused(model, tmp_path, r"layers\.1\.mlp\.up_proj: quant\.weights\.bits 3")

    def test_refuses_a_quantized_input(self, tmp_path):
        model = quantize(tiny_lm.build(), Q8_0, QuantSpec(granularity="token", dynamic=True))
        self.refused(model, tmp_path, f"{Q_PROJ}: its input is quantized")

    def test_refuses_another_architecture(self, tmp_path):
        sentence = "model_type 'olmo2': it writes llama, mistral, qwen2, qwen3"
        self.refused(quantized("olmo2"), tmp_path, sentence)

    def test_refuses_a_bias_that_readers_have_no_place_for(self, tmp_path):
        model = quantized("qwen3")
        model.get_submodule(Q_PROJ).ensure_bias()
        self.refused(model, tmp_path, rf"readers of architecture qwen3 have no place for {Q_PROJ}\.bias")

    def test_refuses_a_tensor_that_the_format_has_no_name_for(self, tmp_path):
        model = quantized()
        model.model.layers[1].mlp.register_buffer("signs", torch.ones(4))
        self.refused(model, tmp_path, r"no place for model\.layers\.1\.mlp\.signs")

    @pytest.mark.parametrize(("architecture", "rope"), ROPES)
    def test_refuses_rotations_that_readers_do_not_compute(self, architecture, rope, tmp_path):
        self.refused(quantized(architecture, rope_parameters=rope), tmp_path, "cannot hold rope_parameters")

    def test_refuses_another_activation_function(self, tmp_path):
        self.refused(quantized(hidden_act="gelu"), tmp_path, "hidden_act gelu: readers .* compute silu")

    def test_refuses_a_quantized_layer_that_is_not_linear(self, tmp_path):
        model = quantized()
        model.add_module("vision", QuantConv2d(nn.Conv2d(3, 4, 3), QuantSpec(granularity="channel"), None))
        self.refused(model, tmp_path, "linear layers only, and vision is not one")

    def test_refuses_a_model_without_quantized_layers(self, tmp_path):
        self.refused(tiny_lm.build(), tmp_path, "no quantized layer")


class TestVerify:
    @pytest.fixture
    def model(self, tmp_path):
        model = quantized(spec=Q4_1)
        export(model, tmp_path)
        assert verify(model, tmp_path).largest_difference == 0.0
        return model

    def change(self, folder, name, byte, bit):
        """Flip one bit of a tensor's row 0 in the file."""
        tensor = next(tensor for tensor in GGUFReader(folder / FILE).tensors if tensor.name == name)
        with (folder / FILE).open("r+b") as file:
            file.seek(int(tensor.data_offset) + byte)
            (old,) = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([old ^ bit]))

    def test_sees_one_changed_bit_of_a_code(self, model, tmp_path):
        self.change(tmp_path, "blk.0.ffn_up.weight", byte=4, bit=1)
        scale = model.model.layers[0].mlp.up_proj.weight_scale[0, 0].item()
        assert verify(model, tmp_path).largest_difference == pytest.approx(scale)

    @pytest.mark.parametrize("byte", [0, 2], ids=["scale", "minimum"])
    def test_sees_one_changed_bit_of_a_scale_or_minimum(self, byte, model, tmp_path):
        self.change(tmp_path, "blk.0.attn_v.weight", byte, bit=1)
        assert 0 < verify(model, tmp_path).largest_difference < 0.1

    def test_sees_a_changed_tensor_that_is_not_quantized(self, model, tmp_path):
        self.change(tmp_path, "output_norm.weight", byte=3, bit=0x80)
        gain = model.model.norm.weight[0].item()
        assert verify(model, tmp_path).largest_difference == pytest.approx(2 * abs(gain))

    def test_names_a_tensor_that_is_missing(self, model, tmp_path):
        export(quantized(spec=Q4_1, tie_word_embeddings=True), tmp_path)
        with pytest.raises(ExportError, match=r"tensor output\.weight is missing"):
            verify(model, tmp_path)

    def test_names_a_tensor_that_does_not_belong(self, model, tmp_path):
        with pytest.raises(ExportError, match=r"tensor output\.weight is in model\.gguf but not"):
            verify(quantized(spec=Q4_1, tie_word_embeddings=True), tmp_path)

    def test_names_a_tensor_of_another_shape(self, model, tmp_path):
        with pytest.raises(ExportError, match=r"tensor blk\.0\.ffn_gate\.weight has shape \[128, 64\]"):
            verify(quantized(spec=Q4_1, intermediate_size=96), tmp_path)

    def test_refuses_a_file_that_is_no_gguf_file(self, model, tmp_path):
        (tmp_path / FILE).write_bytes(b"no" * 20)
        with pytest.raises(ExportError, match="cannot be read back as a GGUF file"):
            verify(model, tmp_path)


def test_a_llamas_layer_may_get_a_bias_from_a_step(tmp_path):
    model = quantized()
    layer = model.get_submodule(Q_PROJ)
    assert isinstance(layer, QuantLinear)
    layer.ensure_bias()
    export(model, tmp_path)
    assert verify(model, tmp_path).largest_difference == 0.0
