"""The blocks of GGUF: 32 codes behind their float16 scale, as pure functions of the canonical record.

Sources: the structures block_q4_0, block_q4_1 and block_q8_0 of ggml (ggml-common.h).
"""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from ptqcore import QuantizedTensor, QuantSpec

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]

BlockType = GGMLQuantizationType
BLOCK = 32

_TYPES = {(4, True): BlockType.Q4_0, (4, False): BlockType.Q4_1, (8, True): BlockType.Q8_0}
_FLOAT_TYPES = {
    torch.float32: BlockType.F32,
    torch.float16: BlockType.F16,
    torch.bfloat16: BlockType.BF16,
}


def block_type(spec: QuantSpec) -> BlockType | None:
    """The kind of block that holds a grid's codes as they are; None if there is none."""
    return None if spec.is_float else _TYPES.get((spec.bits, spec.symmetric))


def float_type(tensor: Tensor) -> BlockType:
    """How a tensor that is not quantized is stored: as it is, vectors as float32 (engines ask for it)."""
    return BlockType.F32 if tensor.ndim == 1 else _FLOAT_TYPES[tensor.dtype]


def byte_shape(shape: tuple[int, ...], kind: BlockType) -> tuple[int, ...]:
    """Shape of the bytes of a tensor: its rows are whole blocks."""
    values, size = GGML_QUANT_SIZES[kind]
    return (*shape[:-1], shape[-1] // values * size)


def float_bytes(tensor: Tensor) -> Bytes:
    """The bytes of a matrix or vector that is not quantized, [rows, bytes per row]."""
    kind = float_type(tensor)
    values = tensor.detach().cpu().contiguous()
    values = values.float() if kind == BlockType.F32 else values
    return values.view(torch.uint8).numpy().reshape(len(values), -1)


def block_scales(record: QuantizedTensor) -> Floats:
    """The scale of every block [rows, columns / 32]; larger groups repeat theirs."""
    rows, columns = record.shape
    scale = record.scale.detach().cpu().double().numpy()
    return np.repeat(np.broadcast_to(scale, (rows, scale.shape[1])), columns // BLOCK // scale.shape[1], 1)


def block_minima(record: QuantizedTensor) -> Floats:
    """What code 0 of every block of an asymmetric record stands for, [rows, columns / 32]:
    −zero_point · scale, exactly."""
    assert record.zero_point is not None
    rows, columns = record.shape
    zero = record.zero_point.detach().cpu().double().numpy()
    zero = np.broadcast_to(zero, (rows, zero.shape[1]))
    return -np.repeat(zero, columns // BLOCK // zero.shape[1], 1) * block_scales(record)


def inexact(values: Floats) -> Floats:
    """Those values that float16 cannot hold."""
    with np.errstate(over="ignore"):
        return values[values.astype(np.float16).astype(np.float64) != values]


def pack_blocks(record: QuantizedTensor) -> Bytes:
    """The rows of a record [rows, columns] as blocks, uint8 [rows, bytes per row]. Per block of 32:

        Q4_0   d (float16), 16 bytes          w = d · (code − 8)
        Q4_1   d, m (float16), 16 bytes       w = d · code + m, where m = −zero_point · d
        Q8_0   d (float16), 32 signed bytes   w = d · byte

    Byte i of the 16 holds code i in its low half and code i + 16 in its high half. Scales must be
    float16 numbers; m is rounded to one. The reference quantizer of Q8_0 never writes −128, but the
    bytes are defined as signed ones, and readers take it for what it is.
    """
    rows = record.shape[0]
    codes = record.codes.cpu().numpy().reshape(rows, -1, BLOCK)
    parts = [_half_bytes(block_scales(record))]
    if record.zero_point is not None:
        parts.append(_half_bytes(block_minima(record)))
    if record.spec.bits == 8:
        parts.append(codes ^ np.uint8(0x80))  # code − 128 in two's complement
    else:
        parts.append(codes[..., :16] | codes[..., 16:] << np.uint8(4))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def _half_bytes(values: Floats) -> Bytes:
    """Little-endian float16 bytes [..., 2] of values [...]."""
    return values.astype("<f2")[..., None].view(np.uint8)


def rounding_of_minima(record: QuantizedTensor) -> Floats:
    """By how much Q4_1 shifts the values of every block [rows, columns / 32], for want of bits in m."""
    minima = block_minima(record)
    return minima.astype(np.float16).astype(np.float64) - minima
