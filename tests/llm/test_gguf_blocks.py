"""Blocks of GGUF byte by byte, and as the gguf package reads them."""

import math

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as BlockType
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import Q4_0, Q4_0_SIGNED, Q4_1, Q8_0, keep_binary_digits

from ptq_llm import gguf_blocks as blocks
from ptqcore import QuantizedTensor, QuantSpec, grid


def record(spec, codes, scale, zero_point=None):
    """One row [1, 32·n] from lists of codes, scales and zero points."""
    zero = None if zero_point is None else torch.tensor([zero_point], dtype=torch.float32)
    codes = torch.tensor([codes], dtype=torch.uint8)
    return QuantizedTensor(codes, torch.tensor([scale]), zero, spec, tuple(codes.shape))


def read(packed, kind):
    return torch.from_numpy(gguf.quants.dequantize(packed, kind))


class TestBytesByHand:
    """float16: 1.5 is 0x3E00, −0.25 is 0xB400, −4.5 is 0xC480; two bytes each, the low one first."""

    def test_q4_0_has_its_scale_then_code_i_in_the_low_and_code_i_plus_16_in_the_high_half(self):
        codes = [*range(16), *reversed(range(16))]
        packed = blocks.pack_blocks(record(Q4_0, codes, [1.5]))
        pairs = "f0e1d2c3b4a5968778695a4b3c2d1e0f"
        assert packed.tobytes().hex() == "003e" + pairs

    def test_q4_0_takes_a_negative_scale(self):
        packed = blocks.pack_blocks(record(Q4_0_SIGNED, [0] * 31 + [15], [-0.25]))
        assert packed.tobytes().hex() == "00b4" + "00" * 15 + "f0"

    def test_q4_1_has_minus_zero_point_times_scale_behind_its_scale(self):
        packed = blocks.pack_blocks(record(Q4_1, [1] * 16 + [2] * 16, [1.5], [3.0]))
        assert packed.tobytes().hex() == "003e" + "80c4" + "21" * 16

    def test_q8_0_has_signed_bytes(self):
        codes = [128, 129, 255, 127, 0] + [128] * 27
        packed = blocks.pack_blocks(record(Q8_0, codes, [-0.25]))
        assert packed.tobytes().hex() == "00b4" + "00017fff80" + "00" * 27

    def test_a_block_starts_where_the_one_before_ends(self):
        packed = blocks.pack_blocks(record(Q4_0, [0] * 32 + [15] * 32, [1.5, -0.25]))
        assert packed.tobytes().hex() == "003e" + "00" * 16 + "00b4" + "ff" * 16

    def test_vectors_are_float32_and_matrices_stay_as_they_are(self):
        half = torch.tensor([1.5, -0.25], dtype=torch.float16)
        assert blocks.float_bytes(half).tobytes() == np.array([1.5, -0.25], "<f4").tobytes()
        assert blocks.float_bytes(half[None]).tobytes().hex() == "003e00b4"
        assert blocks.float_bytes(half[None].bfloat16()).tobytes().hex() == "c03f80be"


SPECS = {BlockType.Q4_0: Q4_0, BlockType.Q4_1: Q4_1, BlockType.Q8_0: Q8_0}


def random_record(spec, rows, columns, seed, digits=None):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** torch.randint(
        -3, 2, (rows, 1), generator=generator
    )
    low, high = grid.value_range(weight, spec)
    found = QuantizedTensor.from_range(weight, low, high, spec)
    scale = found.scale if digits is None else keep_binary_digits(found.scale, digits)
    return QuantizedTensor(found.codes, scale, found.zero_point, spec, found.shape)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(list(SPECS)),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    size=st.sampled_from([32, 64, 96, None]),
    seed=st.integers(0, 2**16),
)
def test_the_gguf_package_reads_the_values_of_the_record(kind, rows, groups, size, seed):
    grouping = {"granularity": "channel"} if size is None else {"granularity": "group", "group_size": size}
    spec = QuantSpec.model_validate(SPECS[kind].model_dump() | {"group_size": None} | grouping)
    quantized = random_record(spec, rows, groups * (size or 32), seed, digits=7)
    packed = blocks.pack_blocks(quantized)
    assert packed.shape == blocks.byte_shape(quantized.shape, kind)
    assert torch.equal(read(packed, kind), quantized.dequantize())


@pytest.mark.parametrize("kind", SPECS)
def test_every_code_is_read_as_what_it_stands_for(kind):
    spec = SPECS[kind]
    codes = list(range(2**spec.bits)) + [0] * (-(2**spec.bits) % 32)
    zero_point = None if spec.symmetric else [5.0]
    quantized = record(spec, codes, [0.5] * (len(codes) // 32), zero_point)
    offset = spec.middle if spec.symmetric else 5
    found = read(blocks.pack_blocks(quantized), kind)
    assert found[0].tolist() == [(code - offset) * 0.5 for code in codes]


def test_the_smallest_float16_is_a_scale():
    quantized = record(Q8_0, [129] * 32, [2.0**-24])
    assert blocks.inexact(blocks.block_scales(quantized)).size == 0
    assert read(blocks.pack_blocks(quantized), BlockType.Q8_0)[0].tolist() == [2.0**-24] * 32


@pytest.mark.parametrize("scale", [0.1, 1 + 2.0**-11, 1e6, 2.0**-25])
def test_what_float16_cannot_hold_is_found(scale):
    assert blocks.inexact(np.array([0.5, scale])).tolist() == [scale]


class TestMinima:
    """A minimum, minus zero point (4 binary digits) times scale, has 11 digits in float16."""

    @pytest.mark.parametrize(("digits", "exact"), [(6, True), (7, True), (8, False), (11, False)])
    def test_scales_of_seven_digits_have_exact_minima_and_those_of_bfloat16_have_not(self, digits, exact):
        significands = np.arange(2 ** (digits - 1), 2**digits)
        scales = np.concatenate([np.ldexp(significands, -24), np.ldexp(significands, -digits)])
        minima = np.multiply.outer(scales, -np.arange(16.0)).ravel()
        assert (blocks.inexact(minima).size == 0) == exact

    def test_scales_of_eleven_digits_shift_a_block_by_the_rounding_of_its_minimum(self):
        quantized = random_record(Q4_1, 8, 96, seed=1)
        shift = blocks.rounding_of_minima(quantized)
        found = read(blocks.pack_blocks(quantized), BlockType.Q4_1).double().numpy()
        exact = quantized.dequantize().double().numpy()
        assert np.array_equal(found - exact, np.repeat(shift, 32, axis=1))
        steps = np.abs(shift) / blocks.block_scales(quantized)
        assert 0 < steps.max() <= 15 * 2**-11

    def test_the_rounding_of_a_minimum_by_hand(self):
        # 15 · 1025/1024 lies between the float16 numbers 15 and 15 + 1/64, 15/1024 above the first.
        quantized = record(Q4_1, [15] * 32, [1025 / 1024], [15.0])
        assert blocks.rounding_of_minima(quantized).tolist() == [[-(1 / 64 - 15 / 1024)]]
        assert math.isclose(-blocks.block_minima(quantized)[0, 0], 15 * 1025 / 1024)
