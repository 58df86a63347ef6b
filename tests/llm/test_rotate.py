"""Rotations leave the function of every architecture as it is, and take its outliers away."""

from types import SimpleNamespace

import pytest
import tiny_lm
import torch
import zoo
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import ptqcore
from ptq_llm import models
from ptq_llm.causal_lm import CausalLM
from ptq_llm.norm_probe import find_norm
from ptq_llm.rotate import Rotate, RotateOptions
from ptq_llm.rotation import Hadamard
from ptq_llm.unify import unify
from ptq_llm.value_heads import find_value_heads
from ptqcore import (
    ExportError,
    MinMax,
    ModelError,
    QuantizedTensor,
    QuantLinear,
    RecipeError,
    attachments_of,
)
from ptqcore.attachments import carry_over
from ptqcore.dataflow import trace
from ptqcore.plugin import discover
from ptqcore.recipe import read_recipe
from ptqcore.rounding import Round

# Where what a norm returns, gain and all, is added to the residual stream.
NORMS_IN_THE_STREAM = {"gemma2", "gemma3_text", "olmo2", "bloom", "bert", "roberta"}
OTHERS = [name for name in zoo.NAMES if name not in NORMS_IN_THE_STREAM]
PARTS = ("residual", "values", "online")


def only(*parts):
    return {part: part in parts for part in PARTS}


def build(name="llama", **changes):
    model = zoo.build(name, **changes)
    unify(model)
    return model


def prepare(model, seed=0, length=24, **options):
    """Run the step on a model; returns the step."""
    task = CausalLM.__new__(CausalLM)
    task._model = model
    excluded = task.excluded(model)
    step = Rotate(RotateOptions(**options), SimpleNamespace(seed=seed, reason_to_skip=excluded.get))
    tokens = zoo.tokens(model, 2, length)

    def run():
        return model(input_ids=tokens, use_cache=False)

    step.prepare(model, trace(model, run), run)
    return step


def logits(model):
    with torch.no_grad():
        return model(input_ids=zoo.tokens(model, 3, 40, seed=3), use_cache=False).logits


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def inputs(model, path):
    """What a module reads [tokens, channels]."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    logits(model)
    handle.remove()
    return seen[0].flatten(0, -2)


def kurtosis(x):
    """Mean over tokens of E[x⁴] / E[x²]² over channels: 3 for normal numbers, n for one outlier of n."""
    return float((x.pow(4).mean(-1) / x.square().mean(-1).square()).mean())


# The function stays


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", OTHERS)
def test_every_part_alone_keeps_the_function(name, part):
    model = build(name)
    expected = logits(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepare(model, **only(part))
    assert difference(logits(model), expected) <= 1e-5
    after = model.state_dict()
    assert any(not torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", OTHERS)
def test_all_parts_together_keep_the_function(name, capsys):
    model = build(name)
    expected = logits(model)
    prepare(model)
    assert difference(logits(model), expected) <= 1e-5
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(NORMS_IN_THE_STREAM))
def test_without_the_residual_stream_the_rest_is_rotated(name, capsys):
    model = build(name)
    expected = logits(model)
    prepare(model)
    assert difference(logits(model), expected) <= 1e-5
    said = capsys.readouterr().err
    assert "rotate: residual is left out: what " in said
    assert "the values of 3 attention layers, the inputs of 6 layers as they run" in said


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_tied_embeddings_are_parted(name):
    model = build(name, tie_word_embeddings=True)
    expected = logits(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight
    prepare(model, **only("residual"))
    assert difference(logits(model), expected) <= 1e-5
    assert not torch.equal(embedding.weight, head.weight)
    assert model.config.tie_word_embeddings is False


def test_embeddings_that_need_not_be_parted_stay_tied():
    model = build("qwen3")
    prepare(model, **only("values", "online"))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings is True


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10},
        {"intermediate_size": 47},
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
        {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=["no Hadamard matrix", "odd", "nine heads", "one head", "biases"],
)
def test_odd_shapes_keep_the_function_too(changes):
    model = build("llama", **changes)
    expected = logits(model)
    prepare(model)
    assert difference(logits(model), expected) <= 1e-5


def test_a_model_whose_embedding_is_projected_keeps_its_function():
    model = build("opt", word_embed_proj_dim=32)
    expected = logits(model)
    prepare(model)
    assert difference(logits(model), expected) <= 1e-5
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_gains_that_are_added_to_one_and_scaled_embeddings_are_no_trouble():
    config = AutoConfig.for_model("gemma", **(zoo._SHAPE | zoo._GROUPED))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    zoo._randomise(model)
    expected = logits(model)
    prepare(model, **only("residual"))
    assert difference(logits(model), expected) <= 1e-5
    assert torch.equal(model.model.norm.weight, torch.zeros(64))


def test_half_precision_is_rotated_as_well_as_it_can_be():
    model = build("llama").bfloat16()
    expected = logits(model)
    prepare(model)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert difference(logits(model), expected) <= 16 * torch.finfo(torch.bfloat16).eps


def test_the_seed_decides_the_rotations():
    models = [build(), build(), build()]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        prepare(model, seed=seed)
    first, again, other = (model.model.layers[1].self_attn.o_proj.weight for model in models)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


# What is rotated


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_residual_stream_is_rotated_and_nothing_attached(name):
    model = build(name)
    block = {"gpt2": "transformer.h.1"}.get(name, "model.layers.1")
    keys, before = model.state_dict().keys(), inputs(model, block)
    step = prepare(model, **only("residual", "values"))
    after = inputs(model, block)
    assert model.state_dict().keys() == keys
    assert step.attaches == ""
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-3, atol=1e-3)
    assert difference(after, before) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "starcoder2", "stablelm"])
def test_norms_that_subtract_the_mean_do_so_in_the_rotated_stream(name):
    model = build(name)
    block = {"gpt2": "transformer.h.1"}.get(name, "model.layers.1")
    before = inputs(model, block).mean(-1)
    prepare(model, **only("residual"))
    torch.testing.assert_close(inputs(model, block).mean(-1), before, rtol=1e-4, atol=1e-5)


def test_gains_and_biases_move_into_layers_that_have_a_bias():
    model = build("starcoder2")
    prepare(model, **only("residual"))
    norm = model.model.layers[0].input_layernorm
    assert torch.equal(norm.weight, torch.ones(64))
    assert torch.equal(norm.bias, torch.zeros(64))


def test_a_bias_that_can_go_nowhere_is_rotated():
    model = build("starcoder2")
    prepare(model, **only("residual"))
    norm = model.model.norm  # the head has no bias
    assert torch.equal(norm.weight, torch.ones(64))
    assert norm.bias.any()
    assert model.lm_head.bias is None


@pytest.mark.parametrize(("name", "layers"), [("llama", 6), ("mixtral", 3 + 3 * 4), ("phi3", 6)])
def test_output_and_down_projections_are_rotated_as_they_run(name, layers):
    model = build(name)
    step = prepare(model, **only("online"))
    attached = {
        path: list(found)
        for path, module in model.named_modules()
        if (found := attachments_of(module)) is not None
    }
    assert len(attached) == layers
    assert all(path.endswith("o_proj") or "down_proj" in path for path in attached)
    assert all(len(found) == 1 and isinstance(found[0], Hadamard) for found in attached.values())
    assert step.attaches


def test_with_rotated_values_only_heads_are_mixed_as_they_run():
    model = build()
    prepare(model)
    (attachment,) = attachments_of(model.model.layers[0].self_attn.o_proj)
    assert attachment.settings() == {"size": 4, "width": 16}


# Heads


def blocks_of(count, *parts):
    """Rows of the values in a fused layer of blocks that have some parts (name, rows) each."""
    rows, start = [], 0
    for _ in range(count):
        for part, size in parts:
            if part == "v":
                rows.append(list(range(start, start + size)))
            start += size
    return rows


HEADS = {  # name → producer, consumer, rows of the values of each head
    "llama": ("self_attn.v_proj", "self_attn.o_proj", [0, 0, 1, 1], blocks_of(2, ("v", 16))),
    "phi3": (
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        [0, 0, 1, 1],
        [list(range(96, 112)), list(range(112, 128))],
    ),
    "gpt2": (
        "attn.c_attn",
        "attn.c_proj",
        [0, 1, 2, 3],
        [list(range(128 + 16 * h, 144 + 16 * h)) for h in range(4)],
    ),
    "gpt_neox": (
        "attention.query_key_value",
        "attention.dense",
        [0, 1, 2, 3],
        blocks_of(4, ("q", 16), ("k", 16), ("v", 16)),
    ),
    "falcon_new": (
        "self_attention.query_key_value",
        "self_attention.dense",
        [0, 0, 1, 1],
        blocks_of(2, ("q", 32), ("k", 16), ("v", 16)),
    ),
    "deepseek_v3": (
        "self_attn.kv_b_proj",
        "self_attn.o_proj",
        [0, 1, 2, 3],
        blocks_of(4, ("k", 8), ("v", 16)),
    ),
    "bert": (
        "attention.self.value",
        "attention.output.dense",
        [0, 1, 2, 3],
        blocks_of(4, ("v", 16)),
    ),
}
LISTS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "falcon_new": "transformer.h",
    "bert": "bert.encoder.layer",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_found_wherever_their_rows_are(name, dtype):
    model = build(name).to(dtype)
    producer, consumer, shared, rows = HEADS[name]
    tokens = zoo.tokens(model)

    def run():
        return model(input_ids=tokens, use_cache=False)

    block = f"{LISTS.get(name, 'model.layers')}.2"
    (found,) = find_value_heads(model, trace(model, run), run, [f"{block}.{consumer}"])
    assert (found.producer, found.consumer) == (f"{block}.{producer}", f"{block}.{consumer}")
    assert found.rows.tolist() == [rows[group] for group in shared]


def test_gates_are_no_heads():
    model = build()
    tokens = zoo.tokens(model)

    def run():
        return model(input_ids=tokens, use_cache=False)

    assert find_value_heads(model, trace(model, run), run, ["model.layers.0.mlp.down_proj"]) == []


# Norms


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("llama", "model.norm", ("weight", None, 1.0, False)),
        ("gemma2", "model.norm", ("weight", None, 0.0, False)),
        ("cohere", "model.norm", ("weight", None, 1.0, True)),
        ("opt", "model.decoder.final_layer_norm", ("weight", "bias", 1.0, True)),
    ],
)
def test_the_convention_of_a_norm_is_found_by_calling_it(name, path, expected):
    norm = find_norm(build(name).get_submodule(path), 64)
    assert (norm.gain, norm.bias, norm.identity, norm.subtracts_mean) == expected


def test_a_norm_may_have_no_parameters():
    norm = find_norm(nn.LayerNorm(64, elementwise_affine=False), 64)
    assert (norm.gain, norm.bias, norm.subtracts_mean) == (None, None, True)


@pytest.mark.parametrize(
    "module",
    [
        nn.Identity(),
        nn.GELU(),
        nn.Softmax(-1),
        nn.Dropout().eval(),
        Scale(),
        nn.Linear(64, 64),
        nn.PReLU(64),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_no_norms(module):
    assert find_norm(module, 64) is None


# Outliers


@torch.no_grad()
def plant(block, factor=100):
    """Make a channel of the values and one of the gated units an outlier; the function stays."""
    attention, mlp = block.self_attn, block.mlp
    width, groups = attention.head_dim, attention.num_key_value_groups
    attention.v_proj.weight[9] *= factor
    attention.o_proj.weight[:, [9 + width * head for head in range(groups)]] /= factor
    mlp.up_proj.weight[5] *= factor
    mlp.down_proj.weight[:, 5] /= factor


@torch.no_grad()
def plant_gains(model, factor=64):
    """Make a channel behind every norm of the blocks an outlier; the function stays."""
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        block.input_layernorm.weight[11] *= factor
        block.post_attention_layernorm.weight[20] *= factor
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer.weight[:, 11] /= factor
        for layer in (mlp.gate_proj, mlp.up_proj):
            layer.weight[:, 20] /= factor


@torch.no_grad()
def test_an_outlier_of_the_residual_stream_is_spread():
    model = build("llama", hidden_size=256, num_attention_heads=4, head_dim=64)
    model.model.embed_tokens.weight[:, 7] *= 60
    before = kurtosis(inputs(model, "model.layers.0"))
    prepare(model, **only("residual"))
    assert before > 100
    assert kurtosis(inputs(model, "model.layers.0")) < 4


@torch.no_grad()
def test_outliers_in_front_of_down_and_output_projections_are_spread():
    model = build("llama", hidden_size=256, num_attention_heads=4, head_dim=64, intermediate_size=384)
    plant(model.model.layers[1])
    paths = ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]
    before = [kurtosis(inputs(model, path)) for path in paths]
    prepare(model, **only("values", "online"))
    assert min(before) > 20
    for path in paths:
        assert kurtosis(inputs(model, path)) < 4


@torch.no_grad()
def test_rotated_values_spread_outliers_within_heads():
    model = build("llama", hidden_size=256, num_attention_heads=4, head_dim=64)
    plant(model.model.layers[1])
    path = "model.layers.1.self_attn.o_proj"
    before = inputs(model, path)[:, :64]  # a head that shares these values
    prepare(model, **only("values"))
    after = inputs(model, path)[:, :64]
    assert kurtosis(before) > 30
    assert kurtosis(after) < 4
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_outliers_that_a_gain_makes_vanish():
    """A gain that is undone in the layers behind is no more in the rotated model than in one without it."""
    clean, planted = build(), build()
    plant_gains(planted)
    path = "model.layers.1.self_attn.q_proj"
    assert kurtosis(inputs(planted, path)) > 5 * kurtosis(inputs(clean, path))
    for model in (clean, planted):
        prepare(model, **only("residual"))
    torch.testing.assert_close(inputs(planted, path), inputs(clean, path), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(planted.get_submodule(path).weight, clean.get_submodule(path).weight)


# What is refused


def test_one_part_at_least_must_be_asked_for():
    with pytest.raises(ValueError, match="residual, values and online are all false"):
        RotateOptions(**only())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "what the norm 'model.layers.0.post_attention_layernorm' returns is added to it"),
        ("olmo2", "what the norm 'model.layers.0.post_attention_layernorm' returns is added to it"),
        ("bloom", "what the norm 'transformer.word_embeddings_layernorm' returns is added to it"),
        (
            "bert",
            "what 'bert.encoder.layer.0.attention.output.dense' returns is added to what a norm returns",
        ),
    ],
)
def test_a_model_of_which_nothing_can_be_rotated_is_refused_in_one_sentence(name, reason):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError) as error:
        prepare(model, **only("residual"))
    assert reason in str(error.value)
    assert "nothing of this model can be rotated" in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_the_dataflow_does_not_show_is_found_by_trying(capsys):
    """The MLPs are scaled by the largest channel of the stream, computed where no map can see it."""
    model = build()

    def scale(module, args, output):
        return output * float(args[0].detach().numpy().max())

    for block in model.model.layers:
        block.mlp.register_forward_hook(scale)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = logits(model)
    prepare(model, **only("residual", "values"))
    said = capsys.readouterr().err
    assert "residual is left out: the outputs would change by 0." in said
    assert "rotate: the values of 3 attention layers; the outputs differ by" in said
    changed = {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert {key.split(".")[-2] for key in changed} == {"v_proj", "o_proj"}
    assert difference(logits(model), expected) <= 1e-5


def test_a_function_of_the_stream_that_is_no_norm_is_named(capsys):
    model = build()
    model.model.layers[1].register_forward_hook(lambda _, args, output: output.clamp(-1, 1))
    prepare(model)
    assert "residual is left out: model.layers.1 computes clamp of it" in capsys.readouterr().err


def test_a_layer_that_other_samples_may_reach_keeps_the_stream_as_it_is(capsys):
    model = build()
    model.model.layers[1].extra = nn.Linear(64, 64)
    prepare(model)
    assert "the first calibration sample does not reach 'model.layers.1.extra'" in capsys.readouterr().err


def test_a_gain_of_zero_beside_a_bias_that_can_go_nowhere_is_refused(capsys):
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 0
    prepare(model)
    assert "'transformer.ln_f' has gains of 0 beside biases that are not" in capsys.readouterr().err


# From a recipe to an artifact


def recipe(folder, *overrides):
    tiny_lm.write_text(folder / "text.txt", 400)
    small = [
        f"task.model={folder / 'model'}",
        f"task.text={folder / 'text.txt'}",
        f"task.calibration={folder / 'text.txt'}",
        "task.window=32",
        "task.max_windows=4",
        "task.calibration_window=32",
        "task.calibration_samples=2",
        "quant.weights.bits=4",
        "quant.activations.bits=4",
        "steps=[rotate, round]",
        "quant.min_tokens=1",
        "export=[]",
    ]
    return read_recipe(discover().recipe_file("w8a8", "llm"), [*small, *overrides])


WEIGHTS_ONLY = ["quant.activations=null", "quant.weights.granularity=group", "quant.weights.group_size=32"]


@pytest.fixture
def folder(tmp_path):
    tiny_lm.save(tmp_path / "model", "qwen3", num_attention_heads=6, intermediate_size=94)
    return tmp_path


def rotated_and_rounded(source, quant):
    """The model of a folder, rotated and then rounded by a loop over its layers."""
    model = models.load(str(source), torch.float32).model
    prepare(model)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            observer = MinMax(quant.weights.spec)
            observer.update(layer.weight)
            quantized = QuantLinear(layer, quant.weights.spec, quant.activations.spec)
            quantized.set_weight(
                QuantizedTensor.from_range(layer.weight, *observer.range(), quant.weights.spec)
            )
            carry_over(layer, quantized)
            model.set_submodule(path, quantized)
    return model


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "mixtral", "gemma2"])
def test_an_artifact_is_the_rotated_and_rounded_model(tmp_path, architecture):
    tiny_lm.save(tmp_path / "model", architecture)
    chosen = recipe(tmp_path)
    ptqcore.quantize(chosen, "llm", tmp_path / "out")
    restored = ptqcore.load(tmp_path / "out")
    expected = rotated_and_rounded(tmp_path / "model", chosen.quant)
    attached = [module for module in restored.modules() if isinstance(module, Hadamard)]
    assert len(attached) == (15 if architecture == "mixtral" else 6)
    assert difference(logits(restored), logits(expected)) <= 1e-6


def test_four_bits_do_not_suffer_from_gains_once_rotated(tmp_path):
    divergence = {}
    for kind in ("clean", "planted"):
        model = zoo.build("llama")
        if kind == "planted":
            plant_gains(model)
        model.save_pretrained(tmp_path / "model")
        tiny_lm.tokenizer().save_pretrained(tmp_path / "model")
        for steps in ("[round]", "[rotate, round]"):
            chosen = recipe(tmp_path, f"steps={steps}")
            record = ptqcore.quantize(chosen, "llm", tmp_path / f"{kind} {steps}")
            divergence[kind, steps] = record.after["kl_divergence"]
    assert divergence["planted", "[round]"] > 2 * divergence["clean", "[round]"]
    rotated = divergence["clean", "[rotate, round]"]
    assert divergence["planted", "[rotate, round]"] == pytest.approx(rotated, rel=0.05)


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(folder, monkeypatch):
    """With sizes of which no Hadamard matrix is known: random parts are computed again, and loaded."""

    class InterruptionError(BaseException):
        pass

    original = Round.block

    def block(self, block, calibration):
        if block.path == "model.layers.1":
            raise InterruptionError
        original(self, block, calibration)

    chosen = recipe(folder)
    ptqcore.quantize(chosen, "llm", folder / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Round, "block", block)
        with pytest.raises(InterruptionError):
            ptqcore.quantize(chosen, "llm", folder / "resumed")
    ptqcore.quantize(chosen, "llm", folder / "resumed", resume=True)
    for file in ("model.safetensors", "manifest.json"):
        assert (folder / "resumed" / file).read_bytes() == (folder / "whole" / file).read_bytes()


def test_exports_that_cannot_hold_online_rotations_are_refused(folder):
    with pytest.raises(ExportError, match=r"cannot hold what the step rotate attaches .*online Hadamard"):
        ptqcore.quantize(
            recipe(folder, *WEIGHTS_ONLY, "quant.weights.group_size=2", "export=[compressed-tensors]"),
            "llm",
            folder / "out",
        )


def test_offline_rotations_export_and_load_in_transformers(tmp_path):
    """Also of a model whose embeddings were tied: the files say that they are no longer."""
    tiny_lm.save(tmp_path / "model", "qwen3")
    steps = "steps=[{rotate: {online: false}}, round]"
    chosen = recipe(tmp_path, *WEIGHTS_ONLY, steps, "export=[compressed-tensors]")
    ptqcore.quantize(chosen, "llm", tmp_path / "out")
    exported, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out/exports/compressed-tensors", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    artifact = ptqcore.load(tmp_path / "out")
    assert any(isinstance(module, QuantLinear) for module in artifact.modules())
    assert difference(logits(exported.eval()), logits(artifact)) <= 1e-4


def test_a_misspelt_option_is_named(folder):
    with pytest.raises(RecipeError, match=r"steps\.0\.rotate\.onlin' is unknown; did you mean 'online'"):
        ptqcore.quantize(recipe(folder, "steps=[{rotate: {onlin: true}}, round]"), "llm", folder / "out")
