"""The temporal block of denoisers, found by what the inputs of their layers depend on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_denoisers import CALLS, STYLES, build, call_of, rand, traced
from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.temporal import TemporalMap, find_temporal
from ptqcore import ModelError


def find(model: nn.Module, call: DenoiserCall) -> TemporalMap:
    return find_temporal(model, traced(model, call), call)


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


# Networks that are no classes of diffusers.

_WIDTH = 4


def sinusoid(t: Tensor) -> Tensor:
    return torch.cat([(t[:, None] / scale).sin() for scale in (1.0, 10.0, 100.0, 1000.0)], 1)


class Network(nn.Module):
    """Four linear layers, put together by a function of the network, x, t and the condition."""

    def __init__(self, wire: Callable[..., Tensor], **more: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        for name, module in more.items():
            self.add_module(name, module)
        self.wire = wire

    def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None) -> Tensor:
        return self.wire(self, x, t, text)


def wired(wire: Callable[..., Tensor], condition: bool = False, **more: nn.Module) -> TemporalMap:
    torch.manual_seed(0)
    model = Network(wire, **more)
    text = {"text": rand(3, _WIDTH, seed=1)} if condition else {}
    call = DenoiserCall.of(model, x=rand(3, _WIDTH), t=torch.tensor([900.0, 500.0, 20.0]), **text)
    return find(model, call)


def test_a_network_of_the_users_own() -> None:
    found = wired(lambda own, x, t, _: own.d(own.c(x) + own.b(own.a(sinusoid(t)).relu())))
    assert found.block == ("a", "b")
    assert found.features == ("b",)
    assert found.layers("sample") == ("c", "d")


def test_a_learned_table_of_times_is_a_layer_of_the_block() -> None:
    table = nn.Embedding(1000, _WIDTH)
    found = wired(lambda own, x, t, _: own.a(x) + own.table(t.long()), table=table)
    assert (found.block, found.features) == (("table",), ("table",))


def test_a_layer_that_is_called_with_time_and_with_the_sample_has_the_class_of_both() -> None:
    found = wired(lambda own, x, t, _: own.a(x) + own.a(sinusoid(t)))
    assert (found.block, found.features) == ((), ())
    assert found.of("a") == "sample"


def test_a_layer_that_feeds_another_and_the_sample_gives_a_feature() -> None:
    def wire(own: Any, x: Tensor, t: Tensor, _: None) -> Tensor:
        first = own.a(sinusoid(t))
        return own.d(x + first) * own.b(first)

    found = wired(wire)
    assert (found.block, found.features) == (("a", "b"), ("a", "b"))


def test_a_zero_weight_hides_no_dependency() -> None:
    zero = nn.Linear(_WIDTH, _WIDTH)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)

    def wire(own: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return own.d(x) + own.b(own.a(sinusoid(t)) + own.zero(text))

    found = wired(wire, condition=True, zero=zero)
    assert (found.block, found.features) == (("a",), ("a",))
    assert (found.conditional, found.conditional_features) == (("b",), ("b",))
    assert not bool(zero.weight.any())


def test_a_weight_that_is_partly_zero_stays() -> None:
    pruned = nn.Linear(_WIDTH, _WIDTH, bias=False)
    nn.init.zeros_(pruned.weight[:, :2])

    def wire(own: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return own.d(x) + own.b(own.pruned(torch.cat([text[:, :2], sinusoid(t)[:, 2:]], 1)))

    found = wired(wire, condition=True, pruned=pruned)
    assert found.conditional == ("pruned",)
    assert found.block == ("b",)


@pytest.mark.parametrize("below", [600, 300])
def test_a_dependency_that_shows_at_some_times_only_is_found(below: float) -> None:
    def wire(own: Any, x: Tensor, t: Tensor, _: None) -> Tensor:
        early = (t < below).float()[:1, None]  # of the first row, which the call has at 900
        return own.d(x) + own.b(own.a(sinusoid(t)) + early * x)

    found = wired(wire)
    assert (found.block, found.features) == (("a",), ("a",))


def test_what_is_read_for_its_shape_and_dtype_alone_is_no_mixture() -> None:
    def wire(own: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        first = own.a(sinusoid(t).to(x)).type_as(text).expand_as(x).view_as(text)
        second = own.b(first + torch.zeros_like(x) + text.new_ones(text.shape))
        return own.d(x + text + second.reshape_as(x))

    found = wired(wire, condition=True)
    assert (found.block, found.features) == (("a", "b"), ("b",))


@pytest.mark.parametrize(
    "meet",
    [
        lambda own, x, y: own.d(x) + y,
        lambda own, x, y: own.d(x).add_(y),
        lambda own, x, y: own.d(torch.cat([x[:, :2], y[:, 2:]], 1)),
        lambda own, x, y: own.d(x) * (1 + y.chunk(2, 1)[0].repeat(1, 2)),
        lambda own, x, y: F.linear(x, y[0].outer(y[1])),
        lambda own, x, y: torch.where(x > 0, y, -y),
        lambda own, x, y: own.d(y[x.argmax(0)]),
    ],
)
def test_any_function_of_both_is_a_mixture(meet: Callable[..., Tensor]) -> None:
    found = wired(lambda own, x, t, _: meet(own, x, own.b(own.a(sinusoid(t)))))
    assert (found.block, found.features) == (("a", "b"), ("b",))


def test_a_function_of_time_that_leaves_the_network_is_a_feature() -> None:
    found = wired(lambda own, x, t, _: (own.d(x), own.b(own.a(sinusoid(t))).relu()))
    assert (found.block, found.features) == (("a", "b"), ("b",))


def test_a_function_of_time_that_goes_nowhere_is_no_feature() -> None:
    found = wired(lambda own, x, t, _: own.d(x) if own.a(sinusoid(t)) is not None else x)
    assert (found.block, found.features) == (("a",), ())


def test_time_that_passes_through_python_numbers_is_seen() -> None:
    def wire(own: Any, x: Tensor, t: Tensor, _: None) -> Tensor:
        return own.d(x) + own.a(torch.full((3, _WIDTH), float(t.sum())))

    found = wired(wire)
    assert (found.block, found.features) == (("a",), ("a",))


def test_a_layer_around_another_is_not_counted_twice() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.more = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)

        @property
        def weight(self) -> Tensor:
            return self.base.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.more(x)

    found = wired(lambda own, x, t, _: own.d(x) + own.adapted(sinusoid(t)), adapted=Adapted())
    assert (found.block, found.features) == (("adapted.base", "adapted.more"),) * 2
    assert found.of("adapted") == "timestep"


def test_an_expert_that_runs_early_or_late_depends_on_what_decides() -> None:
    def wire(own: Any, x: Tensor, t: Tensor, _: None) -> Tensor:
        constant = torch.ones(3, _WIDTH)
        return own.d(x) + (own.a(constant) if float(t[0]) > 400 else constant)

    found = wired(wire)
    assert found.of("a") == "timestep"


_SOURCES = ("x", "text", "time")


@st.composite
def random_networks(draw: st.DrawFn) -> list[tuple[str, ...]]:
    """What each of some layers reads: the sum of inputs and of layers before it."""
    count = draw(st.integers(1, 6))
    return [
        tuple(draw(st.sets(st.sampled_from([*_SOURCES, *map(str, range(layer))]), min_size=1)))
        for layer in range(count)
    ]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_networks())
def test_random_networks_have_the_classes_of_their_wiring(network: list[tuple[str, ...]]) -> None:
    depends = {"x": {"sample"}, "text": {"condition"}, "time": {"timestep"}}
    for layer, reads in enumerate(network):
        depends[str(layer)] = set().union(*(depends[name] for name in reads))

    def wire(own: Any, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        values = {"x": x, "text": text, "time": sinusoid(t)}
        for layer, reads in enumerate(network):
            total = sum(values[name] for name in reads)
            values[str(layer)] = getattr(own, f"layer{layer}")(total).tanh()
        return sum(values.values())  # type: ignore[return-value]

    found = wired(
        wire, condition=True, **{f"layer{n}": nn.Linear(_WIDTH, _WIDTH) for n in range(len(network))}
    )
    for wanted, kind, features in (
        ({"timestep"}, found.block, found.features),
        ({"timestep", "condition"}, found.conditional, found.conditional_features),
    ):
        expected = tuple(f"layer{n}" for n in range(len(network)) if depends[str(n)] == wanted)
        assert kind == expected
        assert features == expected  # all of them are summed with the sample in the end


# What must stay as it was, and what is refused.


def test_the_model_comes_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = build("unet", dropout=0.5)
    model.mid_block.train()
    model.time_embedding.linear_1.weight.data.zero_()
    model.conv_in.weight.requires_grad_(False)
    model.conv_out.weight.grad = rand(*model.conv_out.weight.shape)
    grad = model.conv_out.weight.grad
    parameters = dict(model.named_parameters())
    bits = {name: value.detach().clone() for name, value in parameters.items()}
    versions = {name: value._version for name, value in parameters.items()}
    modes = {name: module.training for name, module in model.named_modules()}
    call = call_of("unet", model)
    flow = traced(model, call)
    state = torch.get_rng_state()
    find_temporal(model, flow, call)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert all(torch.equal(value, bits[name]) for name, value in parameters.items())
    assert {name: value._version for name, value in parameters.items()} == versions
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    assert not model.conv_in.weight.requires_grad
    assert model.conv_in.bias.requires_grad
    assert model.conv_out.weight.grad is grad
    assert torch.equal(grad, rand(*grad.shape))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.layer = nn.Linear(_WIDTH, _WIDTH)
        self.fails = False

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.fails:
            raise RuntimeError("out of memory")
        return self.layer(x) + sinusoid(t)


def test_buffers_come_back_and_so_does_all_after_an_error() -> None:
    model = Counting()
    call = DenoiserCall.of(model, rand(2, _WIDTH), torch.tensor([5.0, 6.0]))
    flow = traced(model, call)
    find_temporal(model, flow, call)
    assert model.calls == 1
    model.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        find_temporal(model, flow, call)
    assert model.calls == 1
    assert model.training
    assert model.layer.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_pass_of_another_call_is_refused() -> None:
    model = build("unet")
    small = DenoiserCall.of(model, rand(1, 3, 8, 8), torch.tensor([500]))
    with pytest.raises(ModelError, match=r"got tensors of shapes .*, the call has .*: trace the model"):
        find_temporal(model, traced(model, small), call_of("unet", model))


def test_a_network_that_takes_another_way_is_refused() -> None:
    def wire(own: Any, x: Tensor, t: Tensor, _: None) -> Tensor:
        return own.a(x) if own.training else own.a(own.a(x))

    with pytest.raises(ModelError, match="module 'a' is called 1 times in the traced pass, and 2 times"):
        wired(wire)


def test_values_that_are_no_numbers_are_refused() -> None:
    def wire(own: Any, x: Tensor, t: Tensor, _: None) -> Tensor:
        return own.a(x / 0 * 0)

    with pytest.raises(ModelError, match="layer 'a' gets values that are not numbers"):
        wired(wire)
