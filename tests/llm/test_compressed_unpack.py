"""The numpy reader against numbers worked out by hand, and against torch's own types."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ptq_llm.unpack import Layout, TensorFile, e4m3_values, read_weight, round_to, unpack_codes
from ptqcore import ExportError


def words(stream: int, count: int) -> np.ndarray:
    """A row [1, count] of the int32 words that hold a number, lowest word first."""
    return np.frombuffer(stream.to_bytes(4 * count, "little"), dtype="<i4").reshape(1, count)


def test_three_bit_codes_straddle_words():
    # Codes of 3 bits are octal digits, the first one last; the eleventh, 5, has its top bit in word 1.
    row = words(0o52107654321, 2)
    assert row[0, 1] == 1
    np.testing.assert_array_equal(unpack_codes(row, 3, 11)[0], [1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 5])


@pytest.mark.parametrize(
    ("bits", "stream", "codes"),
    [
        (2, 0b11_10_01_00, [0, 1, 2, 3]),
        (4, 0xFEDCBA98, [8, 9, 10, 11, 12, 13, 14, 15]),
        (5, 0b11111_00001_00000_10000, [16, 0, 1, 31]),
        (8, 0xFF807F01, [1, 127, 128, 255]),
    ],
)
def test_the_first_code_is_in_the_lowest_bits(bits, stream, codes):
    np.testing.assert_array_equal(unpack_codes(words(stream, 1), bits, len(codes))[0], codes)


@pytest.mark.parametrize(
    ("code", "value"),
    [(0x00, 0.0), (0x01, 2**-9), (0x07, 7 * 2**-9), (0x08, 2**-6), (0x38, 1), (0xB9, -1.125), (0x7E, 448)],
)
def test_fp8_values_follow_from_sign_exponent_and_mantissa(code, value):
    assert e4m3_values()[code] == value


def test_fp8_values_are_torchs():
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(e4m3_values(), theirs)


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_rounding_is_torchs(name, dtype):
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    values[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -0.0])  # ties, and a signed zero
    np.testing.assert_array_equal(round_to(values.numpy(), name), values.to(dtype).float().numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64])
def test_tensors_are_read_as_they_were_written(dtype, tmp_path):
    tensor = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    save_file({"before": torch.ones(5, dtype=torch.uint8), "x": tensor}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.names == {"before", "x"}
    np.testing.assert_array_equal(file.numbers("x", (3, 4)), tensor.to(torch.float64).numpy())
    with pytest.raises(ExportError, match=r"tensor x has shape \[3, 4\] in the file, not \[4, 3\]"):
        file.numbers("x", (4, 3))


def layout(**changes) -> Layout:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 2}
    weights |= {"dynamic": False}
    group = {"targets": ["Linear"], "weights": weights | changes, "input_activations": None}
    config = {"format": "pack-quantized", "ignore": ["lm_head"], "config_groups": {"group_0": group}}
    assert Layout.find(config, "lm_head") is None
    found = Layout.find(config, "layer")
    assert found is not None
    return found


def test_an_asymmetric_weight_by_hand(tmp_path):
    # Codes 8 … 11 and 0, 15, 1, 8 are the numbers 0, 1, 2, 3 and -8, 7, -7, 0. The zero points of the
    # first groups are codes 8, 9 (0 and 1), of the second 7, 10 (-1 and 2), one column to a word.
    save_file(
        {
            "layer.weight_packed": torch.tensor([[0xBA98], [0x81F0]], dtype=torch.int32),
            "layer.weight_scale": torch.tensor([[1.0, 0.5], [2.0, 0.25]]),
            "layer.weight_shape": torch.tensor([2, 4]),
            "layer.weight_zero_point": torch.tensor([[0x98, 0xA7]], dtype=torch.int32),
        },
        tmp_path / "x.safetensors",
    )
    weight = read_weight(TensorFile(tmp_path / "x.safetensors"), "layer", layout(), (2, 4))
    np.testing.assert_array_equal(weight, [[0, 1, 1.5, 2], [-18, 12, -2.25, -0.5]])


def test_a_shape_that_contradicts_the_model_is_refused(tmp_path):
    save_file(
        {
            "layer.weight_packed": torch.zeros(2, 1, dtype=torch.int32),
            "layer.weight_scale": torch.ones(2, 2),
            "layer.weight_shape": torch.tensor([4, 2]),
        },
        tmp_path / "x.safetensors",
    )
    file = TensorFile(tmp_path / "x.safetensors")
    with pytest.raises(ExportError, match=r"layer.weight_shape says \[4, 2\], not \[2, 4\]"):
        read_weight(file, "layer", layout(symmetric=True), (2, 4))
