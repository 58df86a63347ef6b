"""Temporal features without the rest of the denoiser: those that hooks see in whole passes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_denoisers import CALLS, STYLES, build, call_of, find, rand
from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.features_of_time import TimePath, temporal_features
from ptq_diffusion.recording import record
from ptqcore import ModelError

_TIMES = torch.tensor([999, 0, 500, 1, 20, 20, 731])


def hooked(model: nn.Module, call: DenoiserCall, layers: tuple[str, ...]) -> dict[str, Tensor]:
    """What layers first return in a whole pass."""
    found: dict[str, Tensor] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            found.setdefault(path, output.clone())

        return hook

    handles = [model.get_submodule(path).register_forward_hook(note(path)) for path in layers]
    with torch.no_grad():
        call.run(model)
    for handle in handles:
        handle.remove()
    return found


def times_of(style: str) -> Tensor:
    return _TIMES / 1000 if style == "flux" else _TIMES


@pytest.mark.parametrize("style", STYLES)
def test_features_are_those_of_whole_passes(style: str) -> None:
    model = build(style)
    call = call_of(style, model)
    temporal = find(model, call)
    found = temporal_features(model, call, temporal, times_of(style))
    assert tuple(found) == temporal.features
    other = call.with_sample(torch.Generator().manual_seed(1))
    for start in range(0, len(_TIMES) - 1, 2):
        expected = hooked(model, other.with_timestep(times_of(style)[start : start + 2]), temporal.features)
        for path, features in found.items():
            assert features.shape == (len(_TIMES), *expected[path].shape[1:])
            assert torch.equal(features[start : start + 2], expected[path])


@pytest.mark.parametrize("style", STYLES)
def test_more_rows_give_the_same_features_in_fewer_steps(style: str) -> None:
    model = build(style)
    call = call_of(style, model)
    temporal = find(model, call)
    two = temporal_features(model, call, temporal, times_of(style))
    seven = temporal_features(model, call.with_rows(7), temporal, times_of(style))
    for path in temporal.features:
        torch.testing.assert_close(seven[path], two[path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("time", [500, 500.5, torch.tensor(500), torch.tensor(500.0), torch.tensor([500])])
@pytest.mark.parametrize("style", ["unet", "sd1"])
def test_one_timestep_for_all_rows_gives_one_row_each(style: str, time: Any) -> None:
    model = build(style)
    call = DenoiserCall.of(model, **CALLS[style]() | {"timestep": time})
    temporal = find(model, call)
    steps = [936.92, 20.0, 0.0] if isinstance(time, Tensor) else [936, 20, 0]  # UNet2DModel cuts numbers
    found = temporal_features(model, call, temporal, steps)
    for place, step in enumerate(steps):
        expected = hooked(model, call.with_timestep(step), temporal.features)
        for path in temporal.features:
            assert torch.equal(found[path][place], expected[path][0])


def test_one_timestep_for_every_token_gives_one_row_each() -> None:
    model = build("wan")
    by_row = call_of("wan", model)
    by_token = by_row.with_timestep(torch.tensor([500, 20]))
    tokens = DenoiserCall.of(
        model, **CALLS["wan"]() | {"timestep": torch.tensor([500, 20])[:, None].expand(2, 32)}
    )
    one = temporal_features(model, by_token, find(model, by_token), _TIMES)
    other = temporal_features(model, tokens, find(model, tokens), _TIMES)
    assert one.keys() == other.keys()
    for path, features in one.items():
        first = other[path] if other[path].ndim == features.ndim else other[path][:, 0]
        torch.testing.assert_close(first, features, rtol=1e-5, atol=1e-6)


def test_a_map_without_features_gives_none() -> None:
    model = Network(lambda own, x, t: own.a(x))
    call = DenoiserCall.of(model, rand(2, 4), torch.tensor([5.0, 6.0]))
    assert temporal_features(model, call, find(model, call), [1, 2]) == {}


@pytest.mark.parametrize("style", ["unet", "pixart"])
def test_half_precision_is_kept(style: str) -> None:
    model = build(style).to(torch.bfloat16)
    values = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in CALLS[style]().items()
    }
    call = DenoiserCall.of(model, **values)
    temporal = find(model, call)
    found = temporal_features(model, call, temporal, [500, 20])
    expected = hooked(model, call.with_timestep(torch.tensor([500, 20])), temporal.features)
    for path in temporal.features:
        assert found[path].dtype == torch.bfloat16
        assert torch.equal(found[path], expected[path])


def test_a_guidance_that_is_told_is_a_constant_of_the_features() -> None:
    model = build("sana", guidance_embeds=True)
    call = DenoiserCall.of(model, **CALLS["sana"](), guidance=torch.tensor([4.5, 1.0]))
    temporal = find(model, call)
    assert temporal.layers("constant") == (
        "time_embed.guidance_embedder.linear_1",
        "time_embed.guidance_embedder.linear_2",
    )
    found = temporal_features(model, call, temporal, [500, 20])
    expected = hooked(model, call.with_timestep(torch.tensor([500, 20])), temporal.features)
    assert "time_embed.linear" in expected
    assert all(torch.equal(found[path], expected[path]) for path in temporal.features)
    path_of_time = TimePath(model, call, temporal)
    model.time_embed.guidance_embedder.linear_2 = Negated(model.time_embed.guidance_embedder.linear_2)
    with torch.no_grad():
        found = path_of_time([500, 20])
    expected = hooked(model, call.with_timestep(torch.tensor([500, 20])), temporal.features)
    assert all(torch.equal(found[path], expected[path]) for path in temporal.features)


class Negated(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor) -> Tensor:
        return -self.inner(x)


@pytest.mark.parametrize("style", STYLES)
def test_layers_that_were_changed_or_replaced_compute_what_they_now_are(style: str) -> None:
    model = build(style)
    call = call_of(style, model)
    temporal = find(model, call)
    path_of_time = TimePath(model, call, temporal)
    for path in temporal.block:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Negated(model.get_submodule(path)))
    with torch.no_grad():
        found = path_of_time(times_of(style)[:2])
    expected = hooked(model, call.with_timestep(times_of(style)[:2]), temporal.features)
    assert all(torch.equal(found[path], expected[path]) for path in temporal.features)


def test_features_are_differentiable_in_the_weights_of_the_block_alone() -> None:
    model = build("unet")
    call = call_of("unet", model)
    temporal = find(model, call)
    path_of_time = TimePath(model, call, temporal)
    sum(features.square().sum() for features in path_of_time(_TIMES).values()).backward()  # type: ignore[union-attr]
    trained = {name.rpartition(".")[0] for name, one in model.named_parameters() if one.grad is not None}
    assert trained == set(temporal.block)
    weight = model.time_embedding.linear_1.weight
    assert bool(weight.grad.any())


def test_hooks_of_the_block_see_each_timestep_once() -> None:
    model = build("sd1")
    call = call_of("sd1", model)
    temporal = find(model, call)
    path_of_time = TimePath(model, call, temporal)
    seen: dict[str, int] = {}
    for path in temporal.block:
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.update({path: seen.get(path, 0) + len(args[0])})
        )
    ran = []
    model.conv_in.register_forward_hook(lambda *_: ran.append(1))
    path_of_time(_TIMES[:6])
    assert seen == dict.fromkeys(temporal.block, 6)
    assert not ran


def test_the_model_comes_back_as_it_was() -> None:
    model = build("unet", dropout=0.5).train()
    call = call_of("unet", model)
    temporal = find(model.eval(), call)
    model.train()
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    first = temporal_features(model, call, temporal, _TIMES)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    second = temporal_features(model.eval(), call, temporal, _TIMES)
    assert all(torch.equal(first[path], second[path]) for path in first)


def test_the_recording_ends_with_the_last_feature() -> None:
    model = build("pixart")
    call = call_of("pixart", model)
    temporal = find(model, call)
    ran = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda *_: ran.append(1))
    temporal_features(model, call, temporal, _TIMES)
    assert not ran


class Network(nn.Module):
    """Three linear layers, put together by a function of the network, x and t."""

    def __init__(self, wire: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.table = nn.Parameter(rand(4, seed=3))
        self.frequencies = torch.tensor([1.0, 0.1, 0.01, 0.001])  # not registered
        self.wire = wire

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.wire(self, x, t)


def _sines_in_place(own: Any, t: Tensor) -> Tensor:
    made = torch.zeros(len(t), 4)
    made[:, 0::2] = (t[:, None] * own.frequencies[:2]).sin()
    made[:, 1::2].copy_((t[:, None] * own.frequencies[2:]).cos())
    return made


def _read_for_its_form(own: Any, x: Tensor, t: Tensor) -> Tensor:
    time = (t[:, None] * own.frequencies).type_as(x).expand_as(x) + torch.zeros_like(x)
    return own.c(x) + own.b(own.a(time).to(x))


@pytest.mark.parametrize(
    "wire",
    [
        lambda own, x, t: own.c(x) + own.b(own.a(_sines_in_place(own, t)).relu_()),
        lambda own, x, t: own.c(x) + own.b(own.a(_sines_in_place(own, t)) * own.table),
        lambda own, x, t: (
            own.c(x) + own.a(_sines_in_place(own, t)).add_(1) + own.b(_sines_in_place(own, t))
        ),
        lambda own, x, t: (
            own.a(_sines_in_place(own, t)) + own.b(own.a(-_sines_in_place(own, t))) + own.c(x)
        ),
        lambda own, x, t: own.c(x) + own.b(own.a(_sines_in_place(own, t.mul_(0.5)))),
        lambda own, x, t: own.c(x) + own.b(own.a(t[:, None] * own.frequencies).chunk(2, 1)[1].repeat(1, 2)),
        _read_for_its_form,
    ],
)
def test_functions_between_the_layers_are_done_again(wire: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model = Network(wire)
    call = DenoiserCall.of(model, x=rand(2, 4), t=torch.tensor([5.0, 6.0]))
    temporal = find(model, _fresh(call))
    path_of_time = TimePath(model, _fresh(call), temporal)
    model.table = nn.Parameter(2 * model.table)  # read when it is asked for
    times = torch.tensor([3.0, 900.0, 2.0, 7.0])
    for _ in range(2):  # nothing is left behind in the recording
        with torch.no_grad():
            found = path_of_time(times)
        for start in (0, 2):
            expected = hooked(model, call.with_timestep(times[start : start + 2]), temporal.features)
            for path in temporal.features:
                assert torch.equal(found[path][start : start + 2], expected[path])
    assert temporal.features
    assert times.tolist() == [3.0, 900.0, 2.0, 7.0]


def _fresh(call: DenoiserCall) -> DenoiserCall:
    """The call with a copy of its time, into which a network may write."""
    return call.with_timestep(call.times)


def test_dropout_is_off() -> None:
    def wire(own: Any, x: Tensor, t: Tensor) -> Tensor:
        return own.c(x) + own.b(F.dropout(own.a(_sines_in_place(own, t)), training=own.training))

    torch.manual_seed(0)
    model = Network(wire).eval()
    call = DenoiserCall.of(model, x=rand(2, 4), t=torch.tensor([5.0, 6.0]))
    temporal = find(model, call)
    expected = hooked(model, call, temporal.features)
    found = temporal_features(model.train(), call, temporal, [5.0, 6.0])
    assert torch.equal(found["b"], expected["b"])
    assert model.training


def test_a_recording_holds_no_sample_and_leaves_the_time_alone() -> None:
    torch.manual_seed(0)
    model = Network(_read_for_its_form)
    call = DenoiserCall.of(model, x=rand(2, 4), t=torch.tensor([5.0, 6.0]))
    recording = record(model, call, ("a", "b"), ("b",))
    tensors = [leaf for node in recording.nodes for leaf in node.leaves if isinstance(leaf, Tensor)]
    assert [tuple(tensor.shape) for tensor in tensors].count((2, 4)) >= 3  # x, three times
    assert all(tensor.untyped_storage().nbytes() <= 16 for tensor in tensors)
    halving = Network(lambda own, x, t: own.c(x) + own.a(_sines_in_place(own, t.mul_(0.5))))
    recording = record(halving, call, ("a",), ("a",))
    time = torch.tensor([900.0, 20.0])
    first = recording.replay(halving, time)
    assert time.tolist() == [900.0, 20.0]
    assert torch.equal(recording.replay(halving, time)["a"], first["a"])


@pytest.mark.parametrize(
    "wire",
    [
        lambda own, x, t: own.c(x) + own.a(torch.full((2, 4), float(t.sum()))),
        lambda own, x, t: own.c(x) + own.a(t[:, None] * own.frequencies + 0 * x),
    ],
)
def test_features_that_are_not_computed_from_the_timestep_alone_are_refused(
    wire: Callable[..., Tensor],
) -> None:
    torch.manual_seed(0)
    model = Network(wire)
    call = DenoiserCall.of(model, x=rand(2, 4), t=torch.tensor([5.0, 6.0]))
    temporal = find(model, call)
    assert temporal.features == ("a",)
    with pytest.raises(
        ModelError, match="temporal feature of 'a' cannot be computed from the timestep alone"
    ):
        TimePath(model, call, temporal)


def test_tokens_that_are_folded_into_the_rows_give_one_row_each() -> None:
    def wire(own: Any, x: Tensor, t: Tensor) -> Tensor:
        return own.c(x) + own.a(t.flatten()[:, None] * own.frequencies).unflatten(0, (2, 3)).sum(1)

    torch.manual_seed(0)
    model = Network(wire)
    call = DenoiserCall.of(model, x=rand(2, 4), t=torch.tensor([[5.0] * 3, [6.0] * 3]))
    temporal = find(model, call)
    found = temporal_features(model, call, temporal, [7.0, 8.0, 9.0])
    assert found["a"].shape == (3, 4)
    expected = model.a(torch.tensor([7.0, 8.0, 9.0])[:, None] * model.frequencies)
    torch.testing.assert_close(found["a"], expected, rtol=1e-5, atol=1e-6)


def test_features_without_rows_are_refused() -> None:
    torch.manual_seed(0)
    model = Network(
        lambda own, x, t: own.c(x) + own.a((t[:, None] * own.frequencies).mean(0, keepdim=True))
    )
    call = DenoiserCall.of(model, x=rand(2, 4), t=torch.tensor([5.0, 6.0]))
    with pytest.raises(ModelError, match=r"layer 'a' returns \[1, 4\] for 2 rows"):
        temporal_features(model, call, find(model, call), [1, 2])
