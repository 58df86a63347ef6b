"""The zoo: a tiny random language model of every family; no bias is left at 0, no gain at 1."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 257  # the 256 bytes, and the end-of-text token
END = 256
POSITIONS = 256

_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.16,  # the output of a layer is as large as its input: logits of a few units
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {  # latent attention of DeepSeek, with one dense layer before those of experts
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
    "first_k_dense_replace": 1,
}

# name → the model type, and what its configuration has beside or instead of the common shape
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", _GROUPED | {"sliding_window": 8}),
    "qwen2": (
        "qwen2",
        _GROUPED | {"layer_types": _ALTERNATING, "use_sliding_window": True, "sliding_window": 8},
    ),
    "qwen3": ("qwen3", _GROUPED | {"tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        _GROUPED | {"layer_types": _ALTERNATING, "sliding_window": 8, "query_pre_attn_scalar": 16},
    ),
    "gemma3_text": (
        "gemma3_text",
        _GROUPED | {"layer_types": _ALTERNATING, "sliding_window": 8, "query_pre_attn_scalar": 16},
    ),
    "olmo2": ("olmo2", _GROUPED),
    "cohere": ("cohere", _GROUPED | {"logit_scale": 0.5}),
    "phi": ("phi", _GROUPED | {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _GROUPED),
    "falcon_old": ("falcon", {"multi_query": True, "new_decoder_architecture": False, "bias": True}),
    "falcon_new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": ("bloom", {}),
    "gpt_neox": ("gpt_neox", {"use_parallel_residual": True}),
    "gpt2": ("gpt2", {"n_inner": 128}),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std": 0.16}),
    "starcoder2": ("starcoder2", _GROUPED | {"use_bias": True}),
    "stablelm": ("stablelm", _GROUPED | {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "bert": ("bert", {"is_decoder": True}),
    "roberta": ("roberta", {"is_decoder": True, "pad_token_id": 1}),
    "mixtral": (
        "mixtral",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    ),
    "qwen3_moe": ("qwen3_moe", _GROUPED | _EXPERTS | {"num_experts": 8, "norm_topk_prob": True}),
    "deepseek_v3": (
        "deepseek_v3",
        _EXPERTS | _LATENT | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    ),
}
NAMES = tuple(_FAMILIES)


def build(name: str = "llama", auto: Any = AutoModelForCausalLM, **changes: Any) -> PreTrainedModel:
    """The model, float32, in evaluation mode; the same arguments give the same weights."""
    kind, own = _FAMILIES[name]
    config = AutoConfig.for_model(kind, **(_SHAPE | own | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32).eval()
        _randomise(model)
    return model


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Gains around what they are, and biases around 0: a rewrite that forgets one is found out."""
    for tensor in model.state_dict().values():
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor), alpha=0.2)


def tokens(model: PreTrainedModel, batch: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    """Random tokens [batch, length] that the model knows, none of them special."""
    known = min(model.get_input_embeddings().num_embeddings, END)
    return torch.randint(2, known, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, batch: int = 3, length: int = 40) -> Tensor:
    """What the model, however it is quantized, predicts for random tokens: [batch, length, vocabulary]."""
    output: Tensor = model(input_ids=tokens(model, batch, length, seed=3), use_cache=False).logits
    return output
