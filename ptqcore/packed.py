"""The canonical record of a quantized tensor, and one dense bit packer for every width."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ptqcore import grid
from ptqcore.spec import QuantSpec

_WORD = 32
_AT_ONCE = 2**22  # codes


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [rows, n] (uint8, each below 2^bits) into int32 words [rows, ceil(n·bits/32)].

    A row is one dense bit stream, least significant bit first: element j occupies bits
    [j·bits, (j+1)·bits) and may straddle two words.
    """
    rows, n = codes.shape
    words = -(-n * bits // _WORD)
    if 8 % bits == 0:  # no code straddles two bytes: several times faster
        padded = pad(codes, (0, words * _WORD // bits - n)).view(rows, words * 4, 8 // bits)
        whole = (padded << _shifts(bits, codes)).sum(-1, dtype=torch.uint8)
        return whole.flatten().view(torch.int32).view(rows, words)
    parts = torch.split(codes, max(1, _AT_ONCE // max(1, n)))
    return torch.cat([_pack_words(part, bits)[:, :words] for part in parts])


def _pack_words(codes: Tensor, bits: int) -> Tensor:
    """`pack_bits` for codes that straddle words, with more words for what would fill 32 codes."""
    rows, n = codes.shape
    chunks = -(-n // _WORD)
    padded = torch.zeros(rows, chunks * _WORD, dtype=torch.int64, device=codes.device)
    padded[:, :n] = codes
    padded = padded.view(rows, chunks, _WORD)
    packed = torch.zeros(rows, chunks, bits, dtype=torch.int64, device=codes.device)
    for j in range(_WORD):
        word, offset = divmod(j * bits, _WORD)
        packed[..., word] |= padded[..., j] << offset
        if offset + bits > _WORD:
            packed[..., word + 1] |= padded[..., j] >> (_WORD - offset)
    packed &= 0xFFFFFFFF
    signed = torch.where(packed >= 2**31, packed - 2**32, packed)
    return signed.to(torch.int32).view(rows, chunks * bits)


def _shifts(bits: int, codes: Tensor) -> Tensor:
    """Where the codes of a byte begin in it."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)


def unpack_bits(words: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of `pack_bits`: int32 words [rows, ceil(n·bits/32)] to uint8 codes [rows, n].

    Raises:
        ValueError: if the number of words does not fit n codes of that width.
    """
    rows, count = words.shape
    if count != -(-n * bits // _WORD):
        raise ValueError(f"{count} words a row cannot hold {n} codes of {bits} bits")
    mask = 2**bits - 1
    if 8 % bits == 0:  # no code straddles two bytes: several times faster
        codes = words.contiguous().view(torch.uint8).unsqueeze(-1) >> _shifts(bits, words) & mask
        return codes.flatten(1)[:, :n].contiguous()
    chunks = -(-n // _WORD)
    stream = torch.zeros(rows, chunks * bits, dtype=torch.int64, device=words.device)
    stream[:, :count] = words.to(torch.int64) & 0xFFFFFFFF
    stream = stream.view(rows, chunks, bits)
    codes = torch.empty(rows, chunks, _WORD, dtype=torch.uint8, device=words.device)
    for j in range(_WORD):
        word, offset = divmod(j * bits, _WORD)
        value = stream[..., word] >> offset
        if offset + bits > _WORD:
            value = value | (stream[..., word + 1] << (_WORD - offset))
        codes[..., j] = (value & mask).to(torch.uint8)
    return codes.view(rows, chunks * _WORD)[:, :n].contiguous()


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized weight: what every method produces and every exporter reads.

    codes: uint8 [rows, columns]; integers 0 … 2^bits − 1, or the bytes of an FP8 format.
    scale: float, layout of `ptqcore.grid` for a [rows, columns] tensor.
    zero_point: whole numbers in the dtype and layout of the scale; None if symmetric.
    shape: shape of the tensor in the model; rows = shape[0], columns = the rest flattened.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    shape: tuple[int, ...]

    @classmethod
    def from_range(cls, weight: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> "QuantizedTensor":
        """Round `weight` to the nearest values of the grid that covers [low, high].

        The scale is kept in the dtype of the weight; codes are found in float32 for that scale.
        """
        matrix = weight.detach().flatten(1).float()
        scale, zero_point = grid.scale_and_zero_point(low.float(), high.float(), spec)
        scale = scale.to(weight.dtype)
        codes = grid.quantize(matrix, scale.float(), zero_point, spec)
        zero_point = None if zero_point is None else zero_point.to(weight.dtype)
        return cls(codes, scale, zero_point, spec, tuple(weight.shape))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scale and zero point: with spec and shape again they are the same record."""
        return self.codes, self.scale, self.zero_point

    def dequantize(self) -> Tensor:
        """Float values, in the shape of the model's tensor and the dtype of the scale."""
        return grid.dequantize(self.codes, self.scale, self.zero_point, self.spec).view(self.shape)

    def pack(self) -> dict[str, Tensor]:
        """Tensors to store: `codes` (int32 words), `scale` and, if asymmetric, `zero_point` (uint8)."""
        packed = {"codes": pack_bits(self.codes, self.spec.bits), "scale": self.scale}
        if self.zero_point is not None:
            packed["zero_point"] = self.zero_point.to(torch.uint8)
        return packed

    @classmethod
    def unpack(
        cls, packed: dict[str, Tensor], spec: QuantSpec, shape: tuple[int, ...]
    ) -> "QuantizedTensor":
        """Inverse of `pack`."""
        columns = 1
        for size in shape[1:]:
            columns *= size
        codes = unpack_bits(packed["codes"], spec.bits, columns)
        zero_point = packed.get("zero_point")
        if zero_point is not None:
            zero_point = zero_point.to(packed["scale"].dtype)
        return cls(codes, packed["scale"], zero_point, spec, shape)
