"""Tiny random denoisers of nine styles, and a call of each."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.temporal import TemporalMap, find_temporal
from ptqcore.dataflow import Dataflow, trace

ROWS = 2
TEXT, TOKENS = 12, 3

_UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
_TEXT_UNET = _UNET | {"cross_attention_dim": TEXT, "attention_head_dim": 4}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def times(*values: float) -> Tensor:
    return torch.tensor(values or (500, 20))


def unet(**changes: Any) -> Any:
    attention = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DModel(**_UNET | attention | changes)


def sd1(**changes: Any) -> Any:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**_TEXT_UNET | blocks | changes)


def sdxl() -> Any:
    return sd1(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )


def dit() -> Any:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


def pixart(**changes: Any) -> Any:
    return diffusers.PixArtTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 3,
            "out_channels": 6,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "sample_size": 8,
            "caption_channels": TEXT,
            "use_additional_conditions": False,
        }
        | changes
    )


def sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )


def flux() -> Any:
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def wan() -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3,
        out_channels=3,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
    )


def sana(**changes: Any) -> Any:
    return diffusers.SanaTransformer2DModel(
        in_channels=3,
        out_channels=3,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT,
        sample_size=8,
        **changes,
    )


def _image() -> Tensor:
    return rand(ROWS, 3, 8, 8)


def _text() -> Tensor:
    return rand(ROWS, TOKENS, TEXT, seed=1)


def _added() -> dict[str, Tensor]:
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(ROWS, 1)
    return {"text_embeds": rand(ROWS, 10, seed=2), "time_ids": sizes}


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "unet": lambda: {"sample": _image(), "timestep": times()},
    "sd1": lambda: {"sample": _image(), "timestep": times(), "encoder_hidden_states": _text()},
    "sdxl": lambda: {
        "sample": _image(),
        "timestep": times(),
        "encoder_hidden_states": _text(),
        "added_cond_kwargs": _added(),
    },
    "dit": lambda: {
        "hidden_states": _image(),
        "timestep": times(),
        "class_labels": torch.tensor([3, 7]),
    },
    "pixart": lambda: {
        "hidden_states": _image(),
        "encoder_hidden_states": _text(),
        "timestep": times(),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    },
    "sd3": lambda: {
        "hidden_states": _image(),
        "encoder_hidden_states": _text(),
        "pooled_projections": rand(ROWS, 10, seed=2),
        "timestep": times(),
    },
    "flux": lambda: {
        "hidden_states": rand(ROWS, 16, 4),
        "encoder_hidden_states": _text(),
        "pooled_projections": rand(ROWS, 10, seed=2),
        "timestep": times(0.5, 0.02),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(TOKENS, 3),
        "guidance": torch.full((ROWS,), 3.5),
    },
    "wan": lambda: {
        "hidden_states": rand(ROWS, 3, 2, 8, 8),
        "timestep": times(),
        "encoder_hidden_states": _text(),
    },
    "sana": lambda: {
        "hidden_states": _image(),
        "encoder_hidden_states": _text(),
        "timestep": times(),
        "encoder_attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    },
}
_MODELS: dict[str, Callable[..., Any]] = {
    "unet": unet,
    "sd1": sd1,
    "sdxl": sdxl,
    "dit": dit,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "wan": wan,
    "sana": sana,
}
STYLES = tuple(_MODELS)


def build(style: str, **changes: Any) -> Any:
    """A denoiser with random weights, in evaluation mode."""
    torch.manual_seed(0)
    return _MODELS[style](**changes).eval()


def call_of(style: str, model: nn.Module) -> DenoiserCall:
    """The call of a denoiser of some style, with another timestep for each of its rows."""
    return DenoiserCall.of(model, **CALLS[style]())


def traced(model: nn.Module, call: DenoiserCall) -> Dataflow:
    """The dataflow map of a call."""
    return trace(model, lambda: call.run(model))


def find(model: nn.Module, call: DenoiserCall) -> TemporalMap:
    """The temporal map of a denoiser."""
    return find_temporal(model, traced(model, call), call)
