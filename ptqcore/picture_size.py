"""How large a picture says that it is, read from its first bytes, before it is decoded."""

import re
import struct

_SIZE_IN_JPEG = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}


def stated_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG, PNG, BMP, WebP or PPM file; None if it states none, or is a PNG file of
    which a part claims to be longer than what is left: decoders take memory for such."""
    try:
        if content.startswith(b"\xff\xd8"):
            return _jpeg(content)
        if content.startswith(b"\x89PNG"):
            return _png(content)
        if content.startswith(b"BM"):
            return _bmp(content)
        if content.startswith(b"RIFF"):
            return _webp(content)
    except struct.error:
        return None
    return _ppm(content)


def _jpeg(content: bytes) -> tuple[int, int] | None:
    place = 2
    while place < len(content):
        start, marker = struct.unpack_from(">BB", content, place)
        if start != 0xFF or marker == 0xFF:
            place += 1
        elif marker in _SIZE_IN_JPEG:
            height, width = struct.unpack_from(">HH", content, place + 5)
            return width, height
        else:
            length = 0 if marker in _WITHOUT_LENGTH else struct.unpack_from(">H", content, place + 2)[0]
            place += 2 + length
    return None


def _png(content: bytes) -> tuple[int, int] | None:
    width, height = struct.unpack_from(">II", content, 16)
    place, kind = 8, b""
    while kind != b"IEND" and place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        place += 12 + length
    return (width, height) if place <= len(content) else None


def _bmp(content: bytes) -> tuple[int, int]:
    (header,) = struct.unpack_from("<I", content, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", content, 18)
    return abs(width), abs(height)


def _webp(content: bytes) -> tuple[int, int] | None:
    kind = content[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        sides = (int.from_bytes(content[place : place + 3], "little") + 1 for place in (24, 27))
        return next(sides), next(sides)
    return None


def _ppm(content: bytes) -> tuple[int, int] | None:
    found = re.match(rb"P[1-6](?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})\s", content[:4096])
    return (int(found[1]), int(found[2])) if found else None
