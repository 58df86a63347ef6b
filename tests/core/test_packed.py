"""The bit packer against a packer of bit strings, and the record of a quantized weight."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptqcore import grid
from ptqcore.packed import QuantizedTensor, pack_bits, unpack_bits
from ptqcore.spec import QuantSpec

WEIGHT_SPECS = [
    QuantSpec(granularity=granularity, group_size=7 if granularity == "group" else None, **fields)
    for granularity, fields in product(
        ["tensor", "channel", "group"],
        [
            *(
                {"bits": bits, "symmetric": symmetric}
                for bits in range(2, 9)
                for symmetric in (True, False)
            ),
            {"dtype": "e4m3"},
            {"dtype": "e5m2"},
        ],
    )
]


@st.composite
def code_matrices(draw):
    bits = draw(st.integers(2, 8))
    rows, n = draw(st.integers(0, 4)), draw(st.integers(0, 80))
    cell = st.integers(0, 2**bits - 1)
    codes = draw(st.lists(st.lists(cell, min_size=n, max_size=n), min_size=rows, max_size=rows))
    return bits, torch.tensor(codes, dtype=torch.uint8).view(rows, n)


def pack_string(row, bits):
    """Signed 32-bit words of a row, by way of a string of its bits, least significant first."""
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in row)
    stream += "0" * (-len(stream) % 32)
    words = [int(stream[i : i + 32][::-1], 2) for i in range(0, len(stream), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(code_matrices())
@settings(max_examples=200, deadline=None)
def test_words_equal_those_of_a_bit_string(case):
    bits, codes = case
    words = pack_bits(codes, bits)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert words.tolist() == [pack_string(row, bits) for row in codes.tolist()]


@given(code_matrices())
@settings(max_examples=200, deadline=None)
def test_unpacking_gives_the_codes_back(case):
    bits, codes = case
    unpacked = unpack_bits(pack_bits(codes, bits), bits, codes.shape[1])
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_number_of_words_is_the_bits_rounded_up_to_whole_words(bits):
    for n in range(100):
        assert pack_bits(torch.zeros(2, n, dtype=torch.uint8), bits).shape == (2, (n * bits + 31) // 32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_32_values_take_exactly_as_many_words_as_bits(bits):
    codes = torch.full((3, 32), 2**bits - 1, dtype=torch.uint8)
    words = pack_bits(codes, bits)
    assert words.shape == (3, bits)
    assert (words == -1).all()


def test_known_words():
    assert pack_bits(torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), 8).tolist() == [[0x04030201]]
    assert pack_bits(torch.tensor([[7, 0, 5]], dtype=torch.uint8), 3).tolist() == [[0b101_000_111]]
    assert pack_bits(torch.tensor([[0] * 7 + [8]], dtype=torch.uint8), 4).tolist() == [[-(2**31)]]
    # The eleventh 3-bit value straddles two words: its lowest two bits end the first one.
    assert pack_bits(torch.tensor([[0] * 10 + [7]], dtype=torch.uint8), 3).tolist() == [[-(2**30), 1]]


def test_non_contiguous_codes_can_be_packed():
    codes = torch.arange(12, dtype=torch.uint8).view(4, 3).T
    assert torch.equal(pack_bits(codes, 4), pack_bits(codes.contiguous(), 4))


@pytest.mark.parametrize("count", [0, 3, 5])
def test_wrong_number_of_words_is_refused(count):
    words = torch.zeros(1, count, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{count} words a row cannot hold 32 codes of 4 bits"):
        unpack_bits(words, 4, 32)


def quantized(spec, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.2
    low, high = grid.value_range(weight.flatten(1), spec)
    return weight, QuantizedTensor.from_range(weight, low, high, spec)


@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 3, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("spec", WEIGHT_SPECS, ids=str)
def test_pack_and_unpack_of_a_weight_is_exact(spec, shape):
    weight, record = quantized(spec, shape)
    packed = record.pack()
    columns = weight[0].numel()
    assert set(packed) == {"codes", "scale"} | (set() if spec.symmetric else {"zero_point"})
    assert packed["codes"].shape == (shape[0], (columns * spec.bits + 31) // 32)
    assert spec.symmetric or packed["zero_point"].dtype == torch.uint8

    again = QuantizedTensor.unpack(packed, spec, shape)
    assert (again.spec, again.shape) == (spec, shape)
    assert torch.equal(again.codes, record.codes)
    assert torch.equal(again.scale, record.scale)
    if not spec.symmetric:
        assert again.zero_point.dtype == record.zero_point.dtype
        assert torch.equal(again.zero_point, record.zero_point)
    assert torch.equal(again.dequantize(), record.dequantize())
    assert again.dequantize().shape == shape


@pytest.mark.parametrize("shape", [(6, 10), (4, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("spec", [spec for spec in WEIGHT_SPECS if spec.dtype == "int"], ids=str)
def test_dequantized_weight_is_code_minus_zero_point_times_scale(spec, shape):
    weight, record = quantized(spec, shape)
    rows, columns = record.codes.shape
    width = {"tensor": columns, "channel": columns, "group": 7}[spec.granularity]
    expected = np.empty((rows, columns), dtype=np.float32)
    for i in range(rows):
        for j in range(columns):
            where = (0 if spec.granularity == "tensor" else i, j // width)
            offset = 2 ** (spec.bits - 1) if spec.symmetric else int(record.zero_point[where])
            expected[i, j] = np.float32(int(record.codes[i, j]) - offset) * record.scale[where].numpy()
    np.testing.assert_array_equal(record.dequantize().flatten(1).numpy(), expected)
    steps = (weight - record.dequantize()).abs().max() / record.scale.max()
    assert steps <= 0.5 + 1e-4


def test_asymmetric_zero_points_of_both_ends_survive_packing():
    spec = QuantSpec(symmetric=False, granularity="channel")
    weight = torch.tensor([[0.0, 255.0], [-255.0, 0.0], [-100.0, 155.0]])
    record = QuantizedTensor.from_range(weight, *grid.value_range(weight, spec), spec)
    assert record.pack()["zero_point"].flatten().tolist() == [0, 255, 100]
    again = QuantizedTensor.unpack(record.pack(), spec, (3, 2))
    assert torch.equal(again.dequantize(), weight)


def test_record_of_a_trained_parameter_carries_no_graph():
    spec = QuantSpec(granularity="channel")
    weight = torch.nn.Parameter(torch.ones(2, 3))
    record = QuantizedTensor.from_range(weight, -torch.ones(2, 1), torch.ones(2, 1), spec)
    assert not record.dequantize().requires_grad


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weight_is_rounded_to_the_nearest_value_of_its_grid(dtype, symmetric):
    spec = QuantSpec(symmetric=symmetric, granularity="channel")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    record = QuantizedTensor.from_range(weight, *grid.value_range(weight, spec), spec)
    offset = 128 if symmetric else record.zero_point.double()
    exact = weight.double() / record.scale.double() + offset
    nearest = exact.clamp(0, 255)
    assert (record.codes.double() - nearest).abs().max() <= 0.5 + 1e-6
