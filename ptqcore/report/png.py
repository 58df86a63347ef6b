"""Images as PNG files (W3C Portable Network Graphics, third edition), without a library of images."""

import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2}  # channels → grey, RGB


def png(image: "Tensor") -> bytes:
    """The file of an image [1, h, w] (grey) or [3, h, w] (RGB), 8 bits a channel.

    Values are 0 (black) to 1; those outside are drawn as the nearer end, NaN as 0.
    """
    channels, height, width = image.shape
    shades = image.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()
    lines = shades.permute(1, 2, 0).reshape(height, -1).cpu().numpy()
    unfiltered = b"".join(b"\0" + line.tobytes() for line in lines)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(unfiltered, 9)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
