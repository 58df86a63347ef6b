"""Tiny random diffusion models, and pipelines around them, made without any file or network."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = 16
WIDTH = 16


def unet(**config: Any) -> UNet2DModel:
    """Denoises images [n, 1, 8, 8]."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        **config,
    ).eval()


def dit(classes: int = 10) -> DiTTransformer2DModel:
    """Denoises [n, 4, 8, 8] for a class, and gives a variance too: [n, 8, 8, 8]."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=classes,
    ).eval()


def vae(**config: Any) -> AutoencoderKL:
    """Latents [n, 4, h, w] to images [n, 3, 2 h, 2 w]."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        **config,
    ).eval()


def clip_tokenizer() -> CLIPTokenizer:
    """Every byte is a token."""
    words = ["<|startoftext|>", "<|endoftext|>", *ALPHABET, *(letter + "</w>" for letter in ALPHABET)]
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=TOKENS
    )


def clip_text_model() -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(ALPHABET),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval()


def ddim() -> DDIMPipeline:
    return DDIMPipeline(unet(), DDIMScheduler())


def class_to_image() -> DiTPipeline:
    """Its label for no class is 1000, as diffusers has it."""
    return DiTPipeline(dit(classes=1000), vae(), DDIMScheduler(clip_sample=False))


def text_to_image() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    denoiser = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        vae(),
        clip_text_model(),
        clip_tokenizer(),
        denoiser,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


def t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    """Every byte is a token."""
    words = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -1.0),
        *((each, -1.0) for each in ALPHABET),
    ]
    torch.manual_seed(0)
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()
    return encoder, T5TokenizerFast(vocab=words, extra_ids=0)


def flow() -> FluxPipeline:
    """Flow matching with a schedule shifted by the size of the image; the network is told the guidance."""
    encoder, tokenizer = t5()
    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae(shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False),
        clip_text_model(),
        clip_tokenizer(),
        encoder,
        tokenizer,
        denoiser,
    )


def text_to_video() -> WanPipeline:
    """Of 81 frames; guided in two calls of the denoiser."""
    encoder, tokenizer = t5()
    torch.manual_seed(0)
    denoiser = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    frames = AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return WanPipeline(tokenizer, encoder, frames, scheduler, denoiser)
