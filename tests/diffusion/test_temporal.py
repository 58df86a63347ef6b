"""The temporal block of denoisers of diffusers, found by what the inputs of their layers depend on."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny_denoisers import CALLS, STYLES, build, call_of, find, traced

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.temporal import TemporalMap, find_temporal
from ptqcore import ModelError


def found_in(style: str) -> TemporalMap:
    model = build(style)
    return find(model, call_of(style, model))


def paths(text: str) -> tuple[str, ...]:
    """Paths in lines; `{a,b}` stands for either, the first changing slowest."""

    def expanded(path: str) -> Iterator[str]:
        before, brace, rest = path.partition("{")
        choices, _, after = rest.partition("}")
        if not brace:
            yield path
            return
        for choice in choices.split(","):
            yield from expanded(before + choice + after)

    return tuple(found for line in text.split() for found in expanded(line))


@dataclass(frozen=True)
class Expected:
    """What the finder must return, from the modules of diffusers as written; features None: all layers."""

    layers: int
    block: str
    features: str
    conditional: str = ""
    condition: str = ""
    constant: str = ""


_EMBEDDING = "time_embedding.linear_{1,2}"
_PROJECTIONS = """
    down_blocks.{0,1}.resnets.0.time_emb_proj
    mid_block.resnets.{0,1}.time_emb_proj
    up_blocks.{0,1}.resnets.{0,1}.time_emb_proj
"""
_TEXT_UNET = """
    down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_{k,v}
    mid_block.attentions.0.transformer_blocks.0.attn2.to_{k,v}
    up_blocks.1.attentions.{0,1}.transformer_blocks.0.attn2.to_{k,v}
"""
_CAPTION = "caption_projection.linear_{1,2} transformer_blocks.{0,1}.attn2.to_{k,v}"

EXPECTED = {
    "unet": Expected(51, _EMBEDDING + _PROJECTIONS, _PROJECTIONS),
    "sd1": Expected(83, _EMBEDDING + _PROJECTIONS, _PROJECTIONS, condition=_TEXT_UNET),
    "sdxl": Expected(
        85,
        _EMBEDDING,
        "time_embedding.linear_2",
        conditional=_PROJECTIONS,
        condition="add_embedding.linear_{1,2}" + _TEXT_UNET,
    ),
    "dit": Expected(
        23,
        "transformer_blocks.{0,1}.norm1.emb.timestep_embedder.linear_{1,2}",
        "transformer_blocks.{0,1}.norm1.emb.timestep_embedder.linear_2",
        conditional="transformer_blocks.{0,1}.norm1.linear proj_out_1",
        condition="transformer_blocks.{0,1}.norm1.emb.class_embedder.embedding_table",
    ),
    "pixart": Expected(
        27,
        "adaln_single.emb.timestep_embedder.linear_{1,2} adaln_single.linear",
        "adaln_single.emb.timestep_embedder.linear_2 adaln_single.linear",
        condition=_CAPTION,
    ),
    "sd3": Expected(
        33,
        "time_text_embed.timestep_embedder.linear_{1,2}",
        "time_text_embed.timestep_embedder.linear_2",
        conditional="""
            transformer_blocks.0.norm1{,_context}.linear
            transformer_blocks.0.attn.add_{q,k,v}_proj
            transformer_blocks.1.norm1{,_context}.linear
            norm_out.linear
        """,
        condition="time_text_embed.text_embedder.linear_{1,2} context_embedder",
    ),
    "flux": Expected(
        30,
        "time_text_embed.timestep_embedder.linear_{1,2}",
        "time_text_embed.timestep_embedder.linear_2",
        conditional="""
            transformer_blocks.0.norm1{,_context}.linear
            transformer_blocks.0.attn.add_{q,k,v}_proj
            single_transformer_blocks.0.norm.linear
            norm_out.linear
        """,
        condition="time_text_embed.text_embedder.linear_{1,2} context_embedder",
        constant="time_text_embed.guidance_embedder.linear_{1,2}",
    ),
    "wan": Expected(
        27,
        "condition_embedder.time_embedder.linear_{1,2} condition_embedder.time_proj",
        "condition_embedder.time_embedder.linear_2 condition_embedder.time_proj",
        condition="condition_embedder.text_embedder.linear_{1,2} blocks.{0,1}.attn2.to_{k,v}",
    ),
    "sana": Expected(
        29,
        "time_embed.emb.timestep_embedder.linear_{1,2} time_embed.linear",
        "time_embed.emb.timestep_embedder.linear_2 time_embed.linear",
        condition=_CAPTION,
    ),
}


def check(found: TemporalMap, expected: Expected) -> None:
    assert len(found.weights) == expected.layers
    assert found.block == paths(expected.block)
    assert found.features == paths(expected.features)
    assert found.conditional == paths(expected.conditional)
    assert found.conditional_features == paths(expected.conditional)
    assert found.layers("condition") == paths(expected.condition)
    assert found.layers("constant") == paths(expected.constant)
    others = {*found.block, *found.conditional, *found.layers("condition"), *found.layers("constant")}
    assert set(found.layers("sample")) == set(found.weights) - others


@pytest.mark.parametrize("style", STYLES)
def test_the_classes_of_every_style(style: str) -> None:
    check(found_in(style), EXPECTED[style])


@pytest.mark.parametrize("style", STYLES)
def test_a_tiny_denoiser_is_tiny(style: str) -> None:
    assert sum(parameter.numel() for parameter in build(style).parameters()) < 200_000


@pytest.mark.parametrize("style", ["unet", "sd1"])
@pytest.mark.parametrize("time", [500, 500.5, torch.tensor(500), torch.tensor([500])])
def test_the_form_of_the_timestep_changes_nothing(style: str, time: Any) -> None:
    model = build(style)
    check(find(model, DenoiserCall.of(model, **CALLS[style]() | {"timestep": time})), EXPECTED[style])


def test_values_by_position_change_nothing() -> None:
    model = build("unet")
    check(find(model, DenoiserCall.of(model, *CALLS["unet"]().values())), EXPECTED["unet"])


def test_one_timestep_for_every_token_changes_nothing() -> None:
    model = build("wan")
    time = torch.tensor([500, 20])[:, None].expand(2, 32)  # one for each of 2 x 4 x 4 patches
    check(find(model, DenoiserCall.of(model, **CALLS["wan"]() | {"timestep": time})), EXPECTED["wan"])


@pytest.mark.parametrize("style", STYLES)
def test_dependencies_show_in_half_precision_and_in_training_mode(style: str) -> None:
    model = build(style).to(torch.bfloat16).train()
    call = DenoiserCall.of(model, **_half(CALLS[style]()))
    model.eval()
    flow = traced(model, call)
    model.train()
    check(find_temporal(model, flow, call), EXPECTED[style])
    assert all(module.training for module in model.modules())


def _half(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: value if name == "timestep" else _half(value) for name, value in values.items()}
    return values.to(torch.bfloat16) if values.is_floating_point() else values


@pytest.mark.parametrize("style", ["unet", "dit", "sd3"])
def test_dependencies_show_where_all_weights_are_zero(style: str) -> None:
    model = build(style)
    for parameter in model.parameters():
        parameter.data.zero_()
    check(find(model, call_of(style, model)), EXPECTED[style])
    assert not any(bool(parameter.any()) for parameter in model.parameters())


def test_labels_of_classes_make_the_projections_conditional() -> None:
    model = build("unet", num_class_embeds=10)
    call = DenoiserCall.of(model, **CALLS["unet"](), class_labels=torch.tensor([3, 7]))
    expected = Expected(
        52, _EMBEDDING, "time_embedding.linear_2", conditional=_PROJECTIONS, condition="class_embedding"
    )
    check(find(model, call), expected)


def test_a_network_that_embeds_time_and_class_alike() -> None:
    model = build("unet", class_embed_type="timestep")
    call = DenoiserCall.of(model, **CALLS["unet"](), class_labels=torch.tensor([3.0, 7.0]))
    found = find(model, call)
    condition = "class_embedding.linear_{1,2}"
    check(
        found,
        Expected(53, _EMBEDDING, "time_embedding.linear_2", conditional=_PROJECTIONS, condition=condition),
    )
    assert found.of("time_proj") == "timestep+condition"  # it is called with either


def test_projections_to_scale_and_shift() -> None:
    model = build("unet", resnet_time_scale_shift="scale_shift")
    found = find(model, call_of("unet", model))
    check(found, EXPECTED["unet"])
    assert found.weights["mid_block.resnets.0.time_emb_proj"] == 32 * 2 * 16


def test_sizes_of_pixart_are_conditions() -> None:
    model = build("pixart", num_attention_heads=3, cross_attention_dim=24, use_additional_conditions=True)
    added = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    found = find(model, DenoiserCall.of(model, **CALLS["pixart"](), added_cond_kwargs=added))
    assert found.block == paths("adaln_single.emb.timestep_embedder.linear_{1,2}")
    assert found.features == ("adaln_single.emb.timestep_embedder.linear_2",)
    assert found.conditional == ("adaln_single.linear",)


def test_modules_without_weights_have_a_class_too() -> None:
    found = found_in("unet")
    assert found.of("time_proj") == "timestep"
    assert found.of("time_embedding.act") == "timestep"
    assert found.of("time_embedding") == "timestep"
    assert found.of("mid_block.resnets.0") == "sample"
    assert found.of("") == "sample"
    assert "time_proj" not in found.weights
    with pytest.raises(ModelError, match=r"module 'mid_block.resnets' is not called by the denoiser"):
        found.of("mid_block.resnets")


def test_the_table_counts_layers_features_and_weights() -> None:
    lines = found_in("sdxl").table().splitlines()
    assert [line.split() for line in lines] == [
        ["input", "depends", "on", "layers", "features", "weights", "share"],
        ["constant", "0", "-", "0", "0.00%"],
        ["timestep", "2", "1", "1,280", "2.47%"],
        ["condition", "10", "-", "3,072", "5.93%"],
        ["timestep+condition", "8", "8", "3,328", "6.42%"],
        ["sample", "65", "-", "44,144", "85.18%"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_the_same_call_gives_the_same_map() -> None:
    assert found_in("sd3") == found_in("sd3")
