"""What a denoiser is called with, and changed copies of it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_denoisers import CALLS, STYLES, build, call_of, rand
from torch import Tensor, nn

from ptq_diffusion.calls import DenoiserCall, other_times
from ptqcore import DataError, ModelError


class Denoiser(nn.Module):
    def forward(self, x: Any, t: Any, context: Any = None, options: Any = None) -> Any:
        return x, t, context, options


def call(**values: Any) -> DenoiserCall:
    return DenoiserCall.of(Denoiser(), **{"x": rand(2, 3), "t": 7} | values)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


CONDITIONS = {
    "unet": set(),
    "sd1": {"encoder_hidden_states"},
    "sdxl": {"encoder_hidden_states", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"},
    "dit": {"class_labels"},
    "pixart": {"encoder_hidden_states"},
    "sd3": {"encoder_hidden_states", "pooled_projections"},
    "flux": {"encoder_hidden_states", "pooled_projections"},
    "wan": {"encoder_hidden_states"},
    "sana": {"encoder_hidden_states"},
}


@pytest.mark.parametrize("style", STYLES)
def test_conditions_are_all_tensors_but_sample_time_masks_positions_and_guidance(style: str) -> None:
    found = call_of(style, build(style))
    assert set(found.conditions) == CONDITIONS[style]
    assert (found.timestep, found.rows) == ("timestep", 2)
    assert found.sample in ("sample", "hidden_states")


@pytest.mark.parametrize(
    "name",
    [
        "encoder_attention_mask",
        "guidance",
        "hidden_states_masks",
        "image_rotary_emb",
        "img_ids",
        "mask",
        "position_ids",
        "text_rope_pos",
        "timestep_cond",
        "txt_ids",
        "video_coords",
    ],
)
def test_what_a_run_holds_fixed_is_no_condition(name: str) -> None:
    assert call(options={name: rand(2, 3)}).conditions == {}
    assert call(options={name: (rand(2, 3), rand(2, 3))}).conditions == {}


@pytest.mark.parametrize("name", ["added_time_ids", "input_ids", "crop_coords", "masked_image", "hybrids"])
def test_other_names_are_conditions(name: str) -> None:
    assert set(call(options={name: rand(2, 3)}).conditions) == {f"options.{name}"}


def test_bool_tensors_and_numbers_are_no_conditions() -> None:
    assert (
        call(context=torch.ones(2, dtype=torch.bool), options={"scale": 0.5, "names": ["a"]}).conditions
        == {}
    )


def test_conditions_are_found_in_nested_tuples_lists_and_dicts() -> None:
    nested = {"residuals": (rand(2, 1), [rand(2, 2)]), "more": {"text": rand(2, 3)}}
    names = {"options.residuals.0", "options.residuals.1.0", "options.more.text", "context"}
    assert set(call(context=rand(2), options=nested).conditions) == names


@pytest.mark.parametrize("args", [(), ("x",), ("x", "t"), ("x", "t", "context")])
def test_values_by_position_and_by_name_are_the_same_call(args: tuple[str, ...]) -> None:
    values = {"x": rand(2, 3), "t": torch.tensor(7), "context": rand(2, 4, seed=1)}
    rest = {name: value for name, value in values.items() if name not in args}
    made = DenoiserCall.of(Denoiser(), *(values[name] for name in args), **rest)
    assert all(made.values[name] is value for name, value in values.items())
    assert (made.sample, made.timestep) == ("x", "t")
    assert made.run(Denoiser())[:3] == tuple(values.values())


def test_the_sample_is_the_first_tensor_of_the_signature_not_of_the_call() -> None:
    assert DenoiserCall.of(Denoiser(), context=rand(2, 4), t=7, x=rand(2, 3)).sample == "x"


def test_a_list_of_samples_has_as_many_rows_as_tensors() -> None:
    assert call(x=[rand(3, 4), rand(3, 5), rand(3, 6)]).rows == 3


class Timeless(nn.Module):
    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        return x * noise_level


class Wrapper(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "message"),
    [
        (
            Timeless(),
            (rand(2), rand(2)),
            {},
            "no parameter 'timestep', 'timesteps' or 't', only x, noise_level",
        ),
        (Denoiser(), (rand(2),), {}, "without a number or a tensor as 't'"),
        (Denoiser(), (rand(2), None), {}, "without a number or a tensor as 't'"),
        (Denoiser(), (None, rand(2)), {}, "without a tensor beside the time"),
        (Wrapper(), (rand(2), 7), {}, "takes 2 values whose names are not known: call it with keywords"),
    ],
)
def test_what_is_not_the_call_of_a_denoiser_is_refused(
    model: nn.Module, args: Any, kwargs: Any, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        DenoiserCall.of(model, *args, **kwargs)


def test_a_wrapper_is_called_with_keywords() -> None:
    made = DenoiserCall.of(Wrapper(), sample=rand(2, 3), timestep=7)
    assert (made.sample, made.timestep) == ("sample", "timestep")
    assert set(made.run(Wrapper())) == {"sample", "timestep"}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (7, 8, 8),
        (7, 0.5, 0.5),
        (7, torch.tensor(3), 3),
        (torch.tensor(7), 8, torch.tensor(8)),
        (torch.tensor(7), 8.0, torch.tensor(8)),
        (torch.tensor(7), 936.92, torch.tensor(936.92)),
        (torch.tensor([7, 8]), 9, torch.tensor([9, 9])),
        (torch.tensor([7.0]), 9, torch.tensor([9.0])),
        (torch.tensor([7.0, 8.0]).bfloat16(), 9, torch.tensor([9.0, 9.0]).bfloat16()),
        (7, torch.tensor([1, 2]), torch.tensor([1, 2])),
        (torch.tensor(7), torch.tensor([1.0, 2.0]), torch.tensor([1, 2])),
        (torch.tensor([7]), torch.tensor([1.5, 2.5]), torch.tensor([1.5, 2.5])),
        (torch.tensor([[7, 7, 0]] * 2), torch.tensor([1, 2]), torch.tensor([[1, 1, 1], [2, 2, 2]])),
        (torch.tensor([[7, 7]] * 2), torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]])),
    ],
)
def test_another_time_has_the_shape_of_the_old_one_or_one_for_each_row(
    old: Any, new: Any, expected: Any
) -> None:
    made = call(t=old).with_timestep(new).values["t"]
    assert type(made) is type(expected)
    if isinstance(expected, Tensor):
        assert made.dtype == expected.dtype
        assert torch.equal(made, expected)
    else:
        assert made == expected


@pytest.mark.parametrize("times", [torch.zeros(3), torch.zeros(2, 2), torch.zeros(1)])
def test_times_that_are_not_one_for_each_row_are_refused(times: Tensor) -> None:
    with pytest.raises(DataError, match=r"for 2 rows: pass one for each row"):
        call().with_timestep(times)


def test_changed_copies_leave_the_call_alone() -> None:
    first = call(
        context=rand(2, 4, seed=1), options={"img_ids": rand(2, 3, seed=2), "text": rand(5, seed=3)}
    )
    other = first.with_sample(generator())
    assert not torch.equal(other.values["x"], first.values["x"])
    assert other.values["context"] is first.values["context"]
    other = first.with_condition(generator())
    assert other.values["x"] is first.values["x"]
    assert not torch.equal(other.values["context"], first.values["context"])
    assert not torch.equal(other.values["options"]["text"], first.values["options"]["text"])
    assert torch.equal(other.values["options"]["img_ids"], first.values["options"]["img_ids"])
    assert torch.equal(first.values["x"], rand(2, 3))
    assert torch.equal(first.values["options"]["text"], rand(5, seed=3))


def test_copies_share_no_memory() -> None:
    first = call(t=torch.tensor([7, 8]), context=[rand(2, 4, seed=1)])
    made = first.copied()
    made.values["t"].zero_()
    made.values["context"][0].zero_()
    assert first.values["t"].tolist() == [7, 8]
    assert torch.equal(first.values["context"][0], rand(2, 4, seed=1))


def test_random_samples_are_as_large_as_the_old_one_and_zeros_are_replaced_too() -> None:
    made = call(x=rand(100, 100) * 30).with_sample(generator()).values["x"]
    assert float(made.std()) == pytest.approx(30, rel=0.05)
    assert float(call(x=torch.zeros(100, 100)).with_sample(generator()).values["x"].std()) > 0.9


@given(st.lists(st.integers(0, 9), min_size=1), st.integers(0, 99))
def test_class_labels_change_each_and_stay_below_the_largest(labels: list[int], seed: int) -> None:
    first = call(x=rand(len(labels), 2), context=torch.tensor(labels))
    made = first.with_condition(torch.Generator().manual_seed(seed)).values["context"]
    assert made.dtype == torch.int64
    assert bool((made != torch.tensor(labels)).all())
    assert int(made.min()) >= 0
    assert int(made.max()) <= max(max(labels), 1)


@given(st.lists(st.integers(0, 999), min_size=1))
def test_other_whole_times_differ_in_every_turn_and_stay_below_the_largest(steps: list[int]) -> None:
    given_times = torch.tensor(steps)
    turns = [given_times, *(other_times(given_times, turn) for turn in range(3))]
    assert all(times.dtype == torch.int64 for times in turns)
    assert all(int(times.min()) >= 0 and int(times.max()) <= max(*steps, 3) for times in turns)
    assert all(len({int(times[row]) for times in turns}) == 4 for row in range(len(steps)))


@given(st.lists(st.floats(0, 1000, width=32, allow_subnormal=False), min_size=1))
def test_other_fractional_times_differ_in_every_turn(steps: list[float]) -> None:
    given_times = torch.tensor(steps)
    turns = [given_times, *(other_times(given_times, turn) for turn in range(3))]
    top = max(steps) or 1.0
    assert all(float(times.min()) >= 0 and float(times.max()) <= top for times in turns)
    assert all(len({float(times[row]) for times in turns}) >= 3 for row in range(len(steps)))


def test_rows_are_repeated_in_all_tensors_that_have_them() -> None:
    options = {"text": rand(2, 4, seed=1), "img_ids": rand(5, 3), "scale": 0.5}
    made = call(t=torch.tensor([7, 8]), options=options).with_rows(3)
    assert made.rows == 3
    assert torch.equal(made.values["x"], rand(2, 3)[:1].expand(3, -1))
    assert made.values["t"].tolist() == [7, 7, 7]
    assert made.values["options"]["text"].shape == (3, 4)
    assert made.values["options"]["img_ids"].shape == (5, 3)
    assert made.values["options"]["scale"] == 0.5
    assert call().with_rows(3).values["t"] == 7
    with pytest.raises(DataError, match="the samples 'x' are a list"):
        call(x=[rand(2)]).with_rows(3)


def test_calls_with_a_time_for_each_row_of_one_tensor_are_told_apart() -> None:
    assert call(t=torch.tensor([7, 8])).has_time_of_rows
    assert not call(t=torch.tensor(7)).has_time_of_rows
    assert not call(t=torch.tensor([7])).has_time_of_rows
    assert not call(x=[rand(2), rand(2)], t=torch.tensor([7, 8])).has_time_of_rows


def test_low_precision_becomes_single_and_the_rest_stays() -> None:
    made = call(x=rand(2).bfloat16(), context=rand(2).double(), options=torch.tensor([1, 2])).as_float32()
    kinds = [made.values[name].dtype for name in ("x", "context", "options")]
    assert kinds == [torch.float32, torch.float64, torch.int64]


@pytest.mark.parametrize("style", STYLES)
def test_changed_calls_are_calls_of_the_denoiser(style: str) -> None:
    model = build(style)
    first = DenoiserCall.of(model, **CALLS[style]())
    with torch.no_grad():
        for changed in (
            first.with_sample(generator()),
            first.with_condition(generator()),
            first.with_timestep(0),
            first.with_timestep(torch.tensor([0, 1])),
            first.with_rows(1),
        ):
            assert (
                changed.run(model)[0].shape[1:] == first.values[first.sample].shape[1:] or style == "pixart"
            )
