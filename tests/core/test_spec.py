"""Which grids can be described, and which combinations are refused."""

import pytest
from pydantic import ValidationError

from ptqcore.spec import QuantSpec


def test_default_is_a_symmetric_int8_grid_per_tensor():
    spec = QuantSpec()
    assert (spec.dtype, spec.bits, spec.symmetric, spec.granularity) == ("int", 8, True, "tensor")
    assert spec.group_size is None
    assert not spec.dynamic


@pytest.mark.parametrize(
    ("bits", "levels", "middle"),
    [(2, 3, 2), (3, 7, 4), (4, 15, 8), (5, 31, 16), (6, 63, 32), (7, 127, 64), (8, 255, 128)],
)
def test_levels_and_middle_of_integer_grids(bits, levels, middle):
    spec = QuantSpec(bits=bits)
    assert (spec.levels, spec.middle, spec.is_float) == (levels, middle, False)


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_float_formats_are_float(dtype):
    assert QuantSpec(dtype=dtype).is_float


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 2, "symmetric": False},
        {"granularity": "channel"},
        {"bits": 4, "granularity": "group", "group_size": 1},
        {"granularity": "group", "group_size": 128, "dynamic": True},
        {"granularity": "token", "dynamic": True},
        {"granularity": "tensor", "dynamic": True},
        {"dtype": "e4m3", "granularity": "channel"},
        {"dtype": "e5m2", "granularity": "token", "dynamic": True},
        {"dtype": "e4m3", "granularity": "group", "group_size": 32},
    ],
)
def test_valid_combinations_keep_their_fields(fields):
    spec = QuantSpec(**fields)
    assert {name: getattr(spec, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "greater than or equal to 2"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"bits": 4.5}, "valid integer"),
        ({"dtype": "int8"}, "'int', 'e4m3' or 'e5m2'"),
        ({"granularity": "row"}, "'tensor', 'channel', 'group', 'token' or 'timestep'"),
        ({"dtype": "e4m3", "bits": 4}, "bits 4 with dtype e4m3"),
        ({"dtype": "e5m2", "bits": 7}, "bits 7 with dtype e5m2"),
        ({"dtype": "e4m3", "symmetric": False}, "symmetric false with dtype e4m3"),
        ({"granularity": "group"}, "granularity group without group_size"),
        ({"granularity": "group", "group_size": 0}, "greater than or equal to 1"),
        ({"granularity": "channel", "group_size": 64}, "group_size 64 with granularity channel"),
        ({"group_size": 64}, "group_size 64 with granularity tensor"),
        ({"granularity": "token"}, "granularity token without dynamic"),
        ({"bitz": 4}, "bitz"),
    ],
)
def test_impossible_combinations_are_refused_with_the_reason(fields, message):
    with pytest.raises(ValidationError, match=message):
        QuantSpec(**fields)


def test_a_spec_is_frozen():
    spec = QuantSpec(bits=4)
    with pytest.raises(ValidationError, match="frozen"):
        spec.bits = 8
    assert spec.bits == 4


def test_equal_specs_are_equal_and_hash_alike():
    first, second = QuantSpec(bits=4, granularity="channel"), QuantSpec(bits=4, granularity="channel")
    assert first == second
    assert len({first, second, QuantSpec(bits=3, granularity="channel")}) == 2


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "int8 per tensor"),
        ({"bits": 4, "symmetric": False, "granularity": "channel"}, "int4 asymmetric per channel"),
        ({"bits": 3, "granularity": "group", "group_size": 128}, "int3 per group 128"),
        ({"granularity": "token", "dynamic": True}, "int8 per token dynamic"),
        ({"dtype": "e4m3", "granularity": "channel"}, "fp8-e4m3 per channel"),
        ({"dtype": "e5m2", "dynamic": True}, "fp8-e5m2 per tensor dynamic"),
    ],
)
def test_text_of_a_spec(fields, text):
    assert str(QuantSpec(**fields)) == text
