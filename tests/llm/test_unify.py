"""Weight matrices in other forms become linear layers; the model computes what it computed before."""

import pytest
import tiny_lm
import torch
import zoo
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import ptqcore
from ptq_llm import models
from ptq_llm.experts import ExpertBank, call_each_expert
from ptq_llm.unify import unify
from ptqcore import ModelError, QuantLinear

LINEAR_ALREADY = set(zoo.NAMES) - {
    "falcon_old",
    "falcon_new",
    "gpt2",
    "mixtral",
    "qwen3_moe",
    "deepseek_v3",
}
MIXTURES = {"mixtral": 3, "qwen3_moe": 3, "deepseek_v3": 2}  # name → layers with experts


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def matrices(model):
    """Numbers in the weight matrices of a model's layers, embeddings left out."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings)


# What the model computes


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_logits_stay_what_they_were(name):
    model = zoo.build(name)
    expected = zoo.logits(model)
    report = unify(model)
    assert difference(zoo.logits(model), expected) <= 1e-6
    assert bool(report) == (name not in LINEAR_ALREADY)
    assert not any(what.startswith("left") for what in report.values())


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_weight_matrix_is_a_linear_layer_but_the_routers(name):
    model = zoo.build(name)
    numbers = matrices(model)
    unify(model)
    assert matrices(model) == numbers
    held = {id(m.weight) for m in model.modules() if type(m) in (nn.Linear, QuantLinear)}
    held |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    others = [path for path, p in model.named_parameters() if p.ndim > 1 and id(p) not in held]
    assert len(others) == MIXTURES.get(name, 0)
    assert all(path.endswith("mlp.gate.weight") for path in others)


def test_a_transposed_layer_becomes_a_linear_one_with_the_transposed_weight():
    model = zoo.build("gpt2")
    old = model.transformer.h[1].mlp.c_fc
    assert isinstance(old, Conv1D)
    report = unify(model)
    new = model.transformer.h[1].mlp.c_fc
    assert type(new) is nn.Linear
    assert (new.in_features, new.out_features) == (64, 128)
    assert torch.equal(new.weight, old.weight.T)
    assert new.weight.is_contiguous()
    assert torch.equal(new.bias, old.bias)
    assert report["transformer.h.1.mlp.c_fc"] == "Conv1D: now a linear layer"
    assert len(report) == 3 * 4


def test_unifying_twice_changes_nothing_more():
    model = zoo.build("mixtral")
    unify(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert unify(model) == {}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# Experts


def test_every_expert_is_a_linear_layer_that_views_the_models_weight():
    model = zoo.build("qwen3_moe")
    whole = model.model.layers[0].mlp.experts.gate_up_proj
    report = unify(model)
    bank = model.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(bank, ExpertBank)
    assert all(type(layer) is nn.Linear for layer in bank)
    assert all(torch.equal(layer.weight, one) for layer, one in zip(bank, whole, strict=True))
    assert all(layer.weight.data_ptr() == one.data_ptr() for layer, one in zip(bank, whole, strict=True))
    assert report["model.layers.0.mlp.experts"] == "Qwen3MoeExperts: now 8 experts of linear layers"
    assert "model.layers.0.mlp.experts.gate_up_proj.3.weight" in model.state_dict()


def test_every_expert_is_called_once_in_every_pass_with_the_tokens_routed_to_it():
    model = zoo.build("qwen3_moe")
    unify(model)
    experts = model.model.layers[1].mlp.experts
    rows = []
    for projection in (experts.gate_up_proj, experts.down_proj):
        for layer in projection:
            layer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    for length in (1, 20):
        rows.clear()
        zoo.logits(model, 1, length)
        assert len(rows) == 2 * 8
        assert sum(rows) == 2 * length * 2  # two projections, two experts a token


class Reference(nn.Module):
    """Two experts without a gate, computed token by token: the closed form of `call_each_expert`."""

    has_gate, has_bias, has_post_expert_norm = False, True, False

    def __init__(self):
        super().__init__()
        self.up_proj = nn.ModuleList(nn.Linear(3, 5, bias=False) for _ in range(2))
        self.down_proj = nn.ModuleList(nn.Linear(5, 3, bias=False) for _ in range(2))
        self.up_proj_bias, self.down_proj_bias = torch.randn(2, 5), torch.randn(2, 3)
        self.act_fn = torch.tanh

    def token(self, x, chosen, weights):
        total = torch.zeros(3)
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            if expert < 2:
                inner = torch.tanh(self.up_proj[expert].weight @ x + self.up_proj_bias[expert])
                total += weight * (self.down_proj[expert].weight @ inner + self.down_proj_bias[expert])
        return total


@torch.no_grad()
def test_the_loop_over_experts_is_the_weighted_sum_of_each_tokens_experts():
    torch.manual_seed(0)
    experts, x, weights = Reference(), torch.randn(6, 3), torch.rand(6, 2)
    chosen = torch.tensor([[0, 1], [1, 0], [0, 2], [1, 2], [1, 0], [0, 1]])  # 2 masks a token
    found = call_each_expert(experts, x, chosen, weights)
    expected = torch.stack([experts.token(*each) for each in zip(x, chosen, weights, strict=True)])
    assert torch.allclose(found, expected, atol=1e-6)


def build_other(kind, **own):
    config = AutoConfig.for_model(kind, **(zoo._SHAPE | zoo._GROUPED | own))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    zoo._randomise(model)
    return model


def test_experts_that_are_transposed_interleaved_and_biased():
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    model = build_other("gpt_oss", num_local_experts=4, num_experts_per_tok=2, layer_types=kinds)
    whole = model.model.layers[0].mlp.experts.down_proj
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj_bias.normal_()
    expected = zoo.logits(model)
    unify(model)
    assert difference(zoo.logits(model), expected) <= 1e-6
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts.down_proj[2].weight, whole[2].T)
    assert experts.down_proj[2].weight.is_contiguous()
    assert isinstance(experts.down_proj_bias, nn.Parameter)


def test_experts_that_transformers_cannot_compute_otherwise_are_left_and_reported():
    model = build_other("jetmoe", num_local_experts=4, kv_channels=16, num_attention_heads=4)
    expected = zoo.logits(model)
    report = unify(model)
    assert torch.equal(zoo.logits(model), expected)
    reason = "left: JetMoeParallelExperts has a parameter of 3 dimensions"
    assert report["model.layers.0.mlp.input_linear.weight"] == reason


def test_short_types_may_differ_by_their_rounding_only():
    model = zoo.build("gpt2").bfloat16()
    expected = zoo.logits(model)
    assert len(unify(model)) == 12
    assert difference(zoo.logits(model), expected) < 0.05


# What is refused or left


def test_a_subclass_that_computes_what_a_linear_layer_does_is_replaced():
    model = zoo.build("falcon_old")
    old = model.transformer.h[0].mlp.dense_4h_to_h
    report = unify(model)
    new = model.transformer.h[0].mlp.dense_4h_to_h
    assert type(old).__name__ == "FalconLinear"
    assert type(new) is nn.Linear
    assert new.weight.data_ptr() == old.weight.data_ptr()
    assert report["transformer.h.0.mlp.dense_4h_to_h"] == "FalconLinear: now a linear layer"


class Louder(nn.Linear):
    def forward(self, x):
        return 1.001 * super().forward(x)


class Tuple(nn.Linear):
    def forward(self, x, extra=None):
        return (super().forward(x),)


def test_a_subclass_that_computes_something_else_is_left_and_reported():
    model = zoo.build("llama")
    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = Louder(old.in_features, old.out_features, bias=False)
    left = model.model.layers[0].mlp.down_proj
    report = unify(model)
    assert report == {
        "model.layers.0.mlp.down_proj": "left: Louder computes something else than a linear layer"
    }
    assert model.model.layers[0].mlp.down_proj is left


def test_a_subclass_that_returns_something_else_is_left_and_reported():
    model = build_other("phimoe", num_local_experts=4, num_experts_per_tok=2)
    report = unify(model)
    assert report["model.layers.0.mlp.router"].startswith("left: PhimoeTopKRouter")
    assert report["model.layers.0.mlp.experts"].endswith("now 4 experts of linear layers")


def test_a_subclass_that_random_tokens_do_not_reach_is_left_and_reported():
    model = zoo.build("llama")
    model.extra = Louder(4, 4)
    assert unify(model) == {"extra": "left: random tokens do not reach it"}


def test_a_changed_function_is_refused_with_the_difference():
    class Scaled(Conv1D):
        def forward(self, x):
            return 1.01 * super().forward(x)

    model = zoo.build("gpt2")
    old = model.transformer.h[1].attn.c_proj
    model.transformer.h[1].attn.c_proj = Scaled(old.nf, old.nx)
    model.transformer.h[1].attn.c_proj.load_state_dict(old.state_dict())
    sentence = (
        r"transformer\.h\.1\.attn\.c_proj as linear layers .* differs by 0\.0099 of the largest value"
    )
    with pytest.raises(ModelError, match=sentence):
        unify(model)


# From a folder to an artifact and back


@pytest.mark.parametrize("name", ["gpt2", "falcon_new", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_an_artifact_restores_what_was_quantized(name, tmp_path):
    folder = tiny_lm.save(tmp_path / "model", name)
    record = ptqcore.quantize(tiny_lm.recipe(folder, tmp_path), "llm", tmp_path / "out")
    loaded = models.load(str(folder), torch.float32).model
    layers = {path for path, m in loaded.named_modules() if type(m) is nn.Linear and path != "lm_head"}
    assert {layer.path for layer in record.layers} == layers
    assert len(record.blocks) == 3
    restored = ptqcore.load(tmp_path / "out")
    assert {path for path, m in restored.named_modules() if isinstance(m, QuantLinear)} == layers
    for path in layers:
        layer, quantized = loaded.get_submodule(path), restored.get_submodule(path)
        step = quantized.weight_scale.repeat_interleave(32, 1)[:, : layer.in_features]
        assert ((layer.weight - quantized.weight).abs() <= step * 0.5001).all()
        assert not torch.equal(layer.weight, quantized.weight)
        layer.weight = nn.Parameter(quantized.weight, requires_grad=False)
    assert torch.equal(zoo.logits(restored), zoo.logits(loaded))
    assert record.after["kl_divergence"] > 0


def test_experts_that_no_token_reaches_are_rounded_all_the_same(tmp_path):
    folder = tiny_lm.save(tmp_path / "model", "qwen3_moe", num_experts=32)
    chosen = tiny_lm.recipe(folder, tmp_path, calibration_window=4, calibration_samples=1)
    record = ptqcore.quantize(chosen, "llm", tmp_path / "out")
    assert len(record.layers) == 3 * (4 + 2 * 32)
    unreached = [layer.path for layer in record.layers if layer.relative_error is None]
    assert 0 < len(unreached) < len(record.layers)
    assert all(".experts." in path for path in unreached)


def test_dynamic_activations_of_experts_that_no_token_reaches(tmp_path):
    folder = tiny_lm.save(tmp_path / "model", "mixtral")
    per_token = {"bits": 8, "granularity": "token", "dynamic": True}
    chosen = tiny_lm.recipe(
        folder, tmp_path, {"activations": per_token}, calibration_window=2, calibration_samples=1
    )
    ptqcore.quantize(chosen, "llm", tmp_path / "out")
    assert torch.isfinite(zoo.logits(ptqcore.load(tmp_path / "out"))).all()


def test_static_activations_of_experts_that_no_token_reaches_are_refused(tmp_path):
    folder = tiny_lm.save(tmp_path / "model", "qwen3_moe", num_experts=32)
    static = {"activations": {"bits": 8, "granularity": "tensor", "dynamic": False}}
    chosen = tiny_lm.recipe(folder, tmp_path, static, calibration_window=2, calibration_samples=1)
    with pytest.raises(ModelError, match=r"mlp\.experts\.\w+\.\d+' received no calibration input"):
        ptqcore.quantize(chosen, "llm", tmp_path / "out")


def test_whole_networks_on_a_grid_leave_out_activations_that_no_token_reaches(tmp_path):
    folder = tiny_lm.save(tmp_path / "model", "mixtral")
    dataflow = {"activations": {"bits": 8, "symmetric": False}, "scope": "dataflow"}
    chosen = tiny_lm.recipe(folder, tmp_path, dataflow, calibration_window=2, calibration_samples=1)
    record = ptqcore.quantize(chosen, "llm", tmp_path / "out")
    skipped = [path for path, why in record.skipped.items() if "no calibration sample reached" in why]
    assert any(".mlp.experts:" in path for path in skipped)
    assert torch.isfinite(zoo.logits(ptqcore.load(tmp_path / "out"))).all()


@pytest.mark.parametrize("step", ["adaround", "brecq"])
def test_learned_rounding_of_experts(step, tmp_path):
    """Quantized layers in front of a router send some tokens to other experts than full precision does,
    and some experts are sent none."""
    folder = tiny_lm.save(tmp_path / "model", "qwen3_moe", num_experts=16, num_hidden_layers=2)
    steps, quant = [{step: {"iterations": 10, "batch": 2}}], {"min_tokens": 0}
    record = ptqcore.quantize(tiny_lm.recipe(folder, tmp_path, quant, steps), "llm", tmp_path / "out")
    assert len(record.layers) == 2 * (4 + 2 * 16)
    assert torch.isfinite(zoo.logits(ptqcore.load(tmp_path / "out"))).all()


def test_learned_rounding_wants_tokens_for_every_expert(tmp_path):
    folder = tiny_lm.save(tmp_path / "model", "qwen3_moe", num_experts=32)
    steps = [{"adaround": {"iterations": 20}}]
    chosen = tiny_lm.recipe(folder, tmp_path, steps=steps, calibration_window=4, calibration_samples=1)
    with pytest.raises(ModelError, match=r"\.experts\.\w+\.\d+' saw 0 calibration tokens, fewer than"):
        ptqcore.quantize(chosen, "llm", tmp_path / "out")
