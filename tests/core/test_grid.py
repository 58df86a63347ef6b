"""Grid arithmetic against closed forms, exact fractions and FP8 tables made from the bit fields."""

import math
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqcore import grid
from ptqcore.packed import QuantizedTensor
from ptqcore.spec import QuantSpec

GROUP = 4
SLACK = 1e-4  # float32 error of x / scale, in steps of the grid


def make_spec(granularity="tensor", **fields):
    group_size = GROUP if granularity == "group" else None
    dynamic = granularity == "token"
    return QuantSpec(granularity=granularity, group_size=group_size, dynamic=dynamic, **fields)


GRANULARITIES = ["tensor", "channel", "group", "token"]
SPECS = [
    *(
        make_spec(granularity, bits=bits, symmetric=symmetric)
        for granularity, bits, symmetric in product(GRANULARITIES, range(2, 9), [True, False])
    ),
    *(
        make_spec(granularity, dtype=dtype)
        for granularity, dtype in product(GRANULARITIES, ["e4m3", "e5m2"])
    ),
]
INTEGER_SPECS = [spec for spec in SPECS if spec.dtype == "int"]


@st.composite
def matrices(draw):
    """Whole numbers times a power of two: rich in ties, zeros and exact arithmetic."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 11))
    bound = draw(st.sampled_from([0, 1, 7, 1000]))
    cells = st.lists(st.integers(-bound, bound), min_size=rows * columns, max_size=rows * columns)
    exponent = draw(st.integers(-12, 12))
    return torch.tensor(draw(cells), dtype=torch.float32).view(rows, columns) * 2.0**exponent


def parts(shape, spec):
    """Independent statement of the layout: for every scale, its index and the elements it serves."""
    rows, columns = shape
    if spec.granularity == "tensor":
        yield (0, 0), (slice(None), slice(None))
    elif spec.granularity in ("channel", "token"):
        for row in range(rows):
            yield (row, 0), (row, slice(None))
    else:
        for row in range(rows):
            for group, start in enumerate(range(0, columns, spec.group_size)):
                yield (row, group), (row, slice(start, start + spec.group_size))


def fitted(x, spec):
    return grid.scale_and_zero_point(*grid.value_range(x, spec), spec)


def spread(parameter, x, spec):
    """A parameter of the layout, written out for every element of x."""
    full = torch.empty_like(x)
    for index, where in parts(x.shape, spec):
        full[where] = parameter[index]
    return full


# Layout


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        ("tensor", (6,), (1,)),
        ("tensor", (2, 3, 10), (1, 1, 1)),
        ("channel", (6, 10), (6, 1)),
        ("channel", (6, 3, 2, 2), (6, 1, 1, 1)),
        ("channel", (6,), (6,)),
        ("group", (6, 8), (6, 2)),
        ("group", (6, 10), (6, 3)),
        ("group", (2, 3, 3), (2, 3, 1)),
        ("group", (9,), (3,)),
        ("token", (2, 3, 10), (2, 3, 1)),
        ("token", (10,), (1,)),
    ],
)
def test_scale_of_a_tensor_has_the_layout_of_its_spec(granularity, shape, expected):
    spec = make_spec(granularity, symmetric=False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale, zero_point = fitted(x, spec)
    assert grid.layout_shape(shape, spec) == expected
    assert scale.shape == expected
    assert zero_point.shape == expected
    assert grid.fake_quantize(x, scale, zero_point, spec).shape == shape


@given(matrices(), st.sampled_from(SPECS))
@settings(max_examples=150, deadline=None)
def test_range_is_the_smallest_and_largest_value_of_each_part_and_contains_zero(x, spec):
    low, high = grid.value_range(x, spec)
    for index, where in parts(x.shape, spec):
        assert low[index] == min(0, x[where].min())
        assert high[index] == max(0, x[where].max())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_part_is_quantized_as_if_it_were_alone(spec):
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    quantized = grid.fake_quantize(x, *fitted(x, spec), spec)
    alone = spec.model_copy(update={"granularity": "tensor", "group_size": None})
    for _, where in parts(x.shape, spec):
        part = x[where]
        assert torch.equal(quantized[where], grid.fake_quantize(part, *fitted(part, alone), alone))


@pytest.mark.parametrize("columns", [1, 3, 4, 5, 8, 11])
def test_groups_split_and_merge_back(columns):
    spec = make_spec("group")
    x = torch.arange(2.0 * columns).view(2, columns) + 1
    groups = grid.split_groups(x, spec)
    assert groups.shape == (2, math.ceil(columns / GROUP), GROUP)
    assert groups.sum() == x.sum()
    assert torch.equal(grid.merge_groups(groups, spec, columns), x)


# Scale and zero point


@pytest.mark.parametrize("bits", range(2, 9))
def test_dynamic_symmetric_scale_is_absmax_over_half_the_levels(bits):
    low, high = torch.tensor([-3.0]), torch.tensor([2.0])
    scale, zero_point = grid.scale_and_zero_point(low, high, QuantSpec(bits=bits, dynamic=True))
    assert zero_point is None
    assert scale.item() == pytest.approx(3 / ((2**bits - 1) / 2), rel=1e-7)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("low", "high"), [(-3.0, 2.0), (-2.0, 3.0), (-2.0, 2.0), (-1.0, 0.0), (0.0, 1.0)])
def test_static_symmetric_scale_is_the_smallest_whose_grid_holds_both_ends(bits, low, high):
    middle = 2 ** (bits - 1)
    scale, zero_point = grid.scale_and_zero_point(
        torch.tensor([low]), torch.tensor([high]), QuantSpec(bits=bits)
    )
    assert zero_point is None
    below, above = -middle * scale.item(), (middle - 1) * scale.item()
    assert below <= low + 1e-6
    assert above >= high - 1e-6
    assert below == pytest.approx(low) or above == pytest.approx(high)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("high", [1.0, 7.0])
def test_signed_scale_puts_the_extra_step_where_the_largest_value_lies(bits, high):
    spec = QuantSpec(bits=bits, signed_scale=True)
    x = torch.tensor([-4.0, 0.0, high])
    scale, zero_point = grid.scale_and_zero_point(x[:1], x[2:], spec)
    assert zero_point is None
    assert scale.item() == pytest.approx((4.0 if high < 4 else -7.0) / 2 ** (bits - 1))
    rounded = grid.fake_quantize(x, scale, None, spec)
    assert rounded[1] == 0
    assert rounded[x.abs().argmax()] == x[x.abs().argmax()]
    assert ((rounded - x).abs() <= scale.abs() * 1.0001).all()
    codes = grid.quantize(x, scale, None, spec)
    assert torch.equal(grid.dequantize(codes, scale, None, spec), rounded)


@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_scale_is_width_over_levels_and_zero_point_is_where_zero_falls(bits):
    levels = 2**bits - 1
    low, high = torch.tensor([-1.0]), torch.tensor([levels - 1.0])
    scale, zero_point = grid.scale_and_zero_point(low, high, QuantSpec(bits=bits, symmetric=False))
    assert scale.item() == 1.0
    assert zero_point.item() == 1.0


@pytest.mark.parametrize(("dtype", "largest"), [("e4m3", 448), ("e5m2", 57344)])
def test_float_scale_is_absmax_over_the_largest_value_of_the_format(dtype, largest):
    spec = QuantSpec(dtype=dtype)
    scale, zero_point = grid.scale_and_zero_point(torch.tensor([-7.0]), torch.tensor([3.5]), spec)
    assert zero_point is None
    assert grid.float_max(spec) == largest
    assert scale.item() == pytest.approx(7 / largest, rel=1e-7)


@pytest.mark.parametrize(("low", "high", "zero_point"), [(1.0, 3.0, 0), (-3.0, -1.0, 15)])
def test_range_on_one_side_of_zero_is_extended_to_zero(low, high, zero_point):
    spec = QuantSpec(bits=4, symmetric=False)
    scale, found = grid.scale_and_zero_point(torch.tensor([low]), torch.tensor([high]), spec)
    assert scale.item() == pytest.approx(3 / 15, rel=1e-7)
    assert found.item() == zero_point


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zeros_get_scale_one_and_stay_zero(spec):
    x = torch.zeros(2, 10)
    scale, zero_point = fitted(x, spec)
    assert (scale == 1).all()
    assert torch.equal(grid.fake_quantize(x, scale, zero_point, spec), x)


def test_asymmetric_range_wider_than_the_largest_half_precision_number_is_covered():
    spec = QuantSpec(symmetric=False)
    x = torch.tensor([-40000.0, 0.0, 40000.0], dtype=torch.float16)
    scale, zero_point = fitted(x, spec)
    error = (grid.fake_quantize(x, scale, zero_point, spec).float() - x.float()).abs()
    assert error.max() <= 80000 / 255


# Scales in a shorter dtype


SHORT = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT_SPECS = [
    QuantSpec(**spec.model_dump() | {"scale_dtype": dtype}) for spec in INTEGER_SPECS for dtype in SHORT
]
SHORT_SPECS += [
    QuantSpec(bits=bits, granularity="group", group_size=GROUP, signed_scale=True, scale_dtype=dtype)
    for bits, dtype in product((2, 4, 8), SHORT)
]


@st.composite
def wide_matrices(draw):
    """Values of any size that float32 has, in rows of very different sizes."""
    cells = st.floats(-1e6, 1e6, width=32) | st.floats(-(2.0**-20), 2.0**-20, width=32) | st.just(0.0)
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    numbers = draw(st.lists(cells, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(numbers, dtype=torch.float32).view(rows, columns)


@given(wide_matrices(), st.sampled_from(SHORT_SPECS))
@settings(max_examples=300, deadline=None)
def test_scales_survive_a_round_trip_through_their_dtype(x, spec):
    scale, zero_point = fitted(x, spec)
    assert scale.dtype == torch.float32
    assert torch.equal(scale.to(SHORT[spec.scale_dtype]).float(), scale)
    assert scale.isfinite().all()
    assert (scale != 0).all()
    assert zero_point is None or ((zero_point >= 0) & (zero_point <= spec.levels)).all()


@given(matrices(), st.sampled_from(SHORT_SPECS))
@settings(max_examples=200, deadline=None)
def test_they_are_the_nearest_to_the_exact_ones(x, spec):
    """Rounding to nearest keeps 11 bits in float16 (from 2^-14 to 65504), 8 in bfloat16."""
    exact, _ = fitted(x, spec.model_copy(update={"scale_dtype": None}))
    found, _ = fitted(x, spec)
    bound = 2.0**-11 if spec.scale_dtype == "float16" else 2.0**-8
    normal = (exact.abs() >= 2.0**-14) & (exact.abs() <= 65504)
    assert ((found - exact).abs() <= bound * exact.abs())[normal].all()


@given(matrices(), st.sampled_from([spec for spec in SHORT_SPECS if not spec.dynamic]))
@settings(max_examples=200, deadline=None)
def test_codes_are_found_for_the_rounded_scale(x, spec):
    """Each is the nearest of all codes to the value, of the grid that the record itself states."""
    record = QuantizedTensor.from_range(x, *grid.value_range(x, spec), spec)
    codes = torch.arange(spec.levels + 1.0)
    scale = spread(record.scale, x, spec)
    zero = torch.full_like(x, spec.middle) if spec.symmetric else spread(record.zero_point, x, spec)
    values = (codes - zero[..., None]) * scale[..., None]
    nearest = (values - x[..., None]).abs().amin(-1)
    error = (record.dequantize() - x).abs()
    assert (error <= nearest + SLACK * scale.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_record_keeps_its_scales_in_the_dtype_of_the_model(dtype):
    spec = QuantSpec(bits=4, granularity="channel", scale_dtype="float16")
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    record = QuantizedTensor.from_range(weight, *grid.value_range(weight.float(), spec), spec)
    assert record.scale.dtype == dtype
    assert torch.equal(record.scale.to(torch.float16).to(dtype), record.scale)


def test_values_too_small_for_a_scale_of_float16_become_zero():
    spec = QuantSpec(bits=4, scale_dtype="float16")
    x = torch.tensor([1e-9, -1e-9, 0.0])
    assert not grid.fake_quantize(x, *fitted(x, spec), spec).any()


def test_without_a_scale_dtype_scales_are_exact():
    x = torch.tensor([[-1.0, 0.3]])
    scale, _ = fitted(x, QuantSpec(bits=3, granularity="channel", symmetric=False))
    assert scale.item() == pytest.approx(1.3 / 7, rel=1e-7)
    assert scale.half().float().item() != scale.item()


# Integer rounding


@given(
    bits=st.integers(2, 8),
    zero_point=st.none() | st.integers(0, 255),
    exponent=st.integers(-8, 8),
    numerators=st.lists(st.integers(-4096, 4096), min_size=1, max_size=20),
    dynamic=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_codes_and_values_equal_exact_fractions(bits, zero_point, exponent, numerators, dynamic):
    """With a power of two as scale all of float32 is exact, and `round` of a Fraction is half to even.

    Static grids add the zero point to what is rounded, as ONNX does; dynamic ones round the sum of
    signed numbers, as readers of compressed-tensors do.
    """
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    spec = QuantSpec(bits=bits, symmetric=zero_point is None, dynamic=dynamic)
    offset = middle if zero_point is None else min(zero_point, levels)
    step = Fraction(2) ** exponent
    exact = [Fraction(n, 8) * step for n in numerators]
    before = offset - middle if dynamic else 0
    codes = [min(max(round(x / step + before) + offset - before, 0), levels) for x in exact]
    values = [float((code - offset) * step) for code in codes]

    x = torch.tensor([float(value) for value in exact])
    scale = torch.tensor([float(step)])
    points = None if zero_point is None else torch.tensor([float(offset)])
    found = grid.quantize(x, scale, points, spec)
    assert found.dtype == torch.uint8
    assert found.tolist() == codes
    assert grid.dequantize(found, scale, points, spec).tolist() == values
    assert grid.fake_quantize(x, scale, points, spec).tolist() == values


@given(matrices(), st.sampled_from(INTEGER_SPECS))
@settings(max_examples=200, deadline=None)
def test_integer_error_inside_the_range_is_at_most_half_a_step(x, spec):
    scale, zero_point = fitted(x, spec)
    error = (x - grid.fake_quantize(x, scale, zero_point, spec)).abs()
    assert (error <= spread(scale, x, spec) * (0.5 + SLACK)).all()


@given(matrices(), st.sampled_from(INTEGER_SPECS))
@settings(max_examples=100, deadline=None)
def test_integer_codes_and_zero_points_are_whole_numbers_of_the_grid(x, spec):
    scale, zero_point = fitted(x, spec)
    codes = grid.quantize(x * 3, scale, zero_point, spec)
    both = grid.nearest(x * 3, scale, zero_point, spec)
    assert torch.equal(both[0], codes)
    assert torch.equal(both[1], grid.dequantize(codes, scale, zero_point, spec))
    assert codes.max() <= 2**spec.bits - 1
    if zero_point is not None:
        assert torch.equal(zero_point, zero_point.round())
        assert zero_point.min() >= 0
        assert zero_point.max() <= 2**spec.bits - 1


@given(matrices(), st.sampled_from(SPECS))
@settings(max_examples=100, deadline=None)
def test_zero_is_on_every_grid(x, spec):
    scale, zero_point = fitted(x, spec)
    assert not grid.fake_quantize(torch.zeros_like(x), scale, zero_point, spec).any()


@given(matrices(), st.sampled_from(SPECS), st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=200, deadline=None)
def test_fake_quantize_is_dequantize_of_quantize_bit_for_bit(x, spec, stretch):
    scale, zero_point = fitted(x, spec)
    stretched = x * stretch
    codes = grid.quantize(stretched, scale, zero_point, spec)
    values = grid.dequantize(codes, scale, zero_point, spec)
    fake = grid.fake_quantize(stretched, scale, zero_point, spec)
    assert torch.equal(fake.view(torch.int32), values.view(torch.int32))


@given(matrices(), st.sampled_from(SPECS))
@settings(max_examples=100, deadline=None)
def test_rounding_twice_is_rounding_once(x, spec):
    scale, zero_point = fitted(x, spec)
    once = grid.fake_quantize(x, scale, zero_point, spec)
    assert torch.equal(grid.fake_quantize(once, scale, zero_point, spec), once)


@pytest.mark.parametrize("constant", [-2.5, 0.3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_grid_holds_a_constant_tensor(bits, constant):
    spec = QuantSpec(bits=bits, symmetric=False)
    x = torch.full((2, 5), constant)
    torch.testing.assert_close(grid.fake_quantize(x, *fitted(x, spec), spec), x, rtol=1e-6, atol=0)


def test_values_beyond_the_range_get_the_outermost_codes():
    x = torch.tensor([-1e6, 1e6, -torch.inf, torch.inf])
    for bits in range(2, 9):
        codes = grid.quantize(x, torch.ones(1), None, QuantSpec(bits=bits))
        assert codes.tolist() == [0, 2**bits - 1] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "spec", [make_spec(g, symmetric=s) for g in GRANULARITIES for s in (True, False)], ids=str
)
def test_dtype_of_the_tensor_is_kept(spec, dtype):
    x = torch.linspace(-1, 1, 20).view(2, 10).to(dtype)
    scale, zero_point = fitted(x, spec)
    assert scale.dtype == dtype
    assert grid.fake_quantize(x, scale, zero_point, spec).dtype == dtype


# Gradient


@pytest.mark.parametrize(
    ("spec", "zero_point", "x", "inside"),
    [
        # int4 symmetric with scale 1 holds -8 … 7, and rounding to nearest extends it by one half.
        (QuantSpec(bits=4), None, [-9.0, -8.6, -8.4, 0.0, 7.4, 7.6, 20.0], [0, 0, 1, 1, 1, 0, 0]),
        (QuantSpec(bits=4, symmetric=False), 3.0, [-3.6, -3.4, 0.2, 12.4, 12.6], [0, 1, 1, 1, 0]),
        (QuantSpec(dtype="e4m3"), None, [-500.0, -448.0, 0.1, 448.0, 449.0], [0, 1, 1, 1, 0]),
        (QuantSpec(dtype="e5m2"), None, [-6e4, -57344.0, 0.1, 57344.0, 6e4], [0, 1, 1, 1, 0]),
    ],
)
def test_gradient_is_one_inside_the_range_and_zero_outside(spec, zero_point, x, inside):
    x = torch.tensor(x, requires_grad=True)
    points = None if zero_point is None else torch.tensor([zero_point])
    incoming = torch.arange(1.0, len(inside) + 1)
    assert grid.inside(x, torch.ones(1), points, spec).tolist() == [bool(flag) for flag in inside]
    grid.fake_quantize(x, torch.ones(1), points, spec).backward(incoming)
    assert torch.equal(x.grad, incoming * torch.tensor(inside))


def test_gradient_of_ragged_groups_has_the_shape_of_the_tensor():
    spec = make_spec("group", bits=4)
    x = torch.ones(2, 10, requires_grad=True)
    scale = torch.tensor([[1.0, 1.0, 0.01]]).expand(2, 3)
    grid.fake_quantize(x, scale, None, spec).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0] * 8 + [0.0] * 2] * 2))


def test_scale_and_zero_point_get_no_gradient():
    x = torch.ones(4, requires_grad=True)
    scale, zero_point = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    grid.fake_quantize(x, scale, zero_point, QuantSpec(symmetric=False)).sum().backward()
    assert scale.grad is None
    assert zero_point.grad is None


# FP8


def fp8_value(code, exponent_bits, mantissa_bits, has_infinity):
    """Value of a byte from its sign, exponent and mantissa; None if it is not a number or infinite."""
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1.0 if code >> 7 else 1.0
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = code & (2**mantissa_bits - 1)
    all_ones = 2**exponent_bits - 1
    if exponent == all_ones and (has_infinity or mantissa == 2**mantissa_bits - 1):
        return None
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


FP8 = {
    "e4m3": {c: v for c in range(256) if (v := fp8_value(c, 4, 3, False)) is not None},
    "e5m2": {c: v for c in range(256) if (v := fp8_value(c, 5, 2, True)) is not None},
}


def nearest_fp8_codes(x, dtype):
    """Codes of the nearest table values, ties to the even code, the sign of zero kept."""
    positive = np.array([FP8[dtype][code] for code in range(128) if code in FP8[dtype]])
    distance = np.abs(np.abs(x.astype(np.float64))[:, None] - positive)
    is_nearest = distance == distance.min(axis=1, keepdims=True)
    odd = np.arange(len(positive)) % 2
    code = np.where(is_nearest, odd, 2).argmin(axis=1)
    return code + 128 * np.signbit(x)


def test_fp8_tables_have_the_published_extremes():
    assert (len(FP8["e4m3"]), max(FP8["e4m3"].values())) == (254, 448.0)
    assert (len(FP8["e5m2"]), max(FP8["e5m2"].values())) == (248, 57344.0)
    assert min(v for v in FP8["e4m3"].values() if v > 0) == 2.0**-9
    assert min(v for v in FP8["e5m2"].values() if v > 0) == 2.0**-16


@pytest.mark.parametrize("dtype", FP8)
def test_every_fp8_code_dequantizes_to_its_table_value_and_back(dtype):
    spec, one = QuantSpec(dtype=dtype), torch.ones(1)
    codes = torch.tensor(list(FP8[dtype]), dtype=torch.uint8)
    values = grid.dequantize(codes, one, None, spec)
    assert values.tolist() == list(FP8[dtype].values())
    assert torch.equal(grid.quantize(values, one, None, spec), codes)


@pytest.mark.parametrize("dtype", FP8)
def test_midpoints_of_fp8_neighbours_round_to_the_even_code(dtype):
    positive = [FP8[dtype][code] for code in range(128) if code in FP8[dtype]]
    midpoints = [(a + b) / 2 for a, b in pairwise(positive)]
    codes = grid.quantize(torch.tensor(midpoints), torch.ones(1), None, QuantSpec(dtype=dtype))
    assert codes.tolist() == [code + code % 2 for code in range(len(midpoints))]


@pytest.mark.parametrize("dtype", FP8)
@given(st.lists(st.floats(-7e4, 7e4, width=32) | st.floats(-2, 2, width=32), min_size=1, max_size=40))
@settings(max_examples=100, deadline=None)
def test_fp8_codes_are_those_of_the_nearest_table_value(dtype, numbers):
    x = np.array(numbers, dtype=np.float32)
    codes = grid.quantize(torch.from_numpy(x), torch.ones(1), None, QuantSpec(dtype=dtype))
    np.testing.assert_array_equal(codes.numpy(), nearest_fp8_codes(x, dtype))


@pytest.mark.parametrize("x", [448.0, 449.0, 464.0, 480.0, 1e30, math.inf])
def test_e4m3_saturates_at_448(x):
    spec = QuantSpec(dtype="e4m3")
    values = grid.fake_quantize(torch.tensor([x, -x]), torch.ones(1), None, spec)
    assert values.tolist() == [448.0, -448.0]


@pytest.mark.parametrize("x", [57344.0, 61440.0, 1e30, math.inf])
def test_e5m2_saturates_at_57344(x):
    spec = QuantSpec(dtype="e5m2")
    values = grid.fake_quantize(torch.tensor([x, -x]), torch.ones(1), None, spec)
    assert values.tolist() == [57344.0, -57344.0]


@pytest.mark.parametrize(("dtype", "mantissa_bits"), [("e4m3", 3), ("e5m2", 2)])
def test_relative_error_of_normal_fp8_numbers_is_half_a_mantissa_step(dtype, mantissa_bits):
    spec = QuantSpec(dtype=dtype)
    x = torch.linspace(0.05, 1.0, 1000)
    values = grid.fake_quantize(x, *fitted(x, spec), spec)
    assert ((values - x).abs() / x).max() <= 2.0 ** -(mantissa_bits + 1) * (1 + 1e-5)
