"""The temporal block of networks of the user's own: every way to wire time, text and sample."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_denoisers import find, rand
from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall
from ptq_diffusion.temporal import TemporalMap
from ptqcore import ModelError

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


def test_values_decide_not_the_way_they_are_computed() -> None:
    found = wired(lambda own, x, t, _: own.d(x) + own.b(own.a(sinusoid(t)) + 0 * x))
    assert (found.block, found.features) == (("a", "b"), ("b",))


def test_a_network_may_write_into_what_it_is_given() -> None:
    found = wired(lambda own, x, t, _: own.d(x.mul_(2)) + own.a(sinusoid(t.mul_(0.5))))
    assert (found.block, found.features) == (("a",), ("a",))


def test_a_tensor_that_is_changed_in_place_is_read_again() -> None:
    def wire(own: Any, x: Tensor, t: Tensor, _: None) -> Tensor:
        both = own.a(sinusoid(t))
        both += x
        return own.b(both)

    found = wired(wire)
    assert (found.block, found.features) == (("a",), ("a",))
    assert found.of("b") == "sample"


def test_a_module_that_is_called_with_a_number_has_a_class() -> None:
    class Waves(nn.Module):
        def forward(self, time: float, width: int) -> Tensor:
            return sinusoid(torch.full((3,), time))[:, :width]

    def wire(own: Any, x: Tensor, t: Tensor, _: None) -> Tensor:
        return own.d(x) + own.a(own.waves(float(t[0]), width=_WIDTH)) + own.waves_of_one(1.0, width=_WIDTH)

    found = wired(wire, waves=Waves(), waves_of_one=Waves())
    assert found.of("waves") == "timestep"
    assert found.of("waves_of_one") == "constant"
    assert found.block == ("a",)


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
