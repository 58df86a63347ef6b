"""Changes to a valid file: bytes anywhere, and values where the format keeps its structure."""

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import yaml

_INTEGERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    127,
    255,
    2**15,
    2**16,
    10**6,
    2**31 - 1,
    2**31,
    2**32,
    10**10,
    2**62,
    2**63,
)
_WORDS = (
    b"../../../etc/passwd", b"/etc/passwd", b"NaN", b"Infinity", b"1e999", b"-1", b"null", b"{}", b"[]",
    b'"\\ud800"', b"\x00", b"\xff\xfe", b"&a", b"*a", b"<<: *a", b"!!python/object/apply:os.system [id]",
    b"os:abort", b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 2000, b'{"a":' * 2000,
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, False, "", "a", "..", "../x", "/etc/passwd", "os:abort", "antigravity:x", "a" * 3000,
    "\ud800", 0.5, -0.0, float("nan"), float("inf"), -1e300, [], {}, [[]], [None], {"": None}, *_INTEGERS,
    -(2**63), 10**400,
)  # fmt: skip


def mutate(content: bytes, name: str, dice: random.Random) -> bytes:
    """A file with one to four changes; those of its structure become ones of bytes where it has none.

    Args:
        content: of the file.
        name: of the file, whose ending tells the format.
        dice: decides.
    """
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        change = _change_of(name)
        try:
            content = change(content, dice) if change and dice.random() < 0.7 else _bytes(content, dice)
        except Exception:
            content = _bytes(content, dice)
    return content


def _change_of(name: str) -> Callable[[bytes, random.Random], bytes] | None:
    for ending, change in _CHANGES.items():
        if name.endswith(ending):
            return change
    return None


def _bytes(content: bytes, dice: random.Random) -> bytes:
    """One change that knows nothing of the format."""
    data, place = bytearray(content), dice.randrange(len(content) + 1)
    kind = dice.randrange(8)
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data[place : place + dice.choice((1, 2, 4, 8, 64))] = b""
    elif kind == 2:
        data[place:place] = dice.choice(_WORDS)
    elif kind == 3:
        start = dice.randrange(len(content) + 1)
        data[place:place] = content[start : start + dice.choice((1, 8, 64, 1024))]
    elif kind == 4:
        data[place : place + 1] = bytes([dice.randrange(256)])
    elif kind == 5 and data:
        data[min(place, len(data) - 1)] ^= 1 << dice.randrange(8)
    elif kind == 6:
        width = dice.choice((1, 2, 4, 8))
        data[place : place + width] = (dice.choice(_INTEGERS) % 256**width).to_bytes(width, "little")
    else:
        data[place:place] = dice.randbytes(dice.choice((1, 4, 32)))
    return bytes(data)


def change_tree(value: Any, dice: random.Random) -> Any:
    """JSON-like data with one entry replaced, removed, doubled, renamed or wrapped many times."""
    holders = [value] if isinstance(value, dict | list) else []
    for holder in holders:  # grows while it is gone through
        inside = holder.values() if isinstance(holder, dict) else holder
        holders += [one for one in inside if isinstance(one, dict | list)]
    holders = [holder for holder in holders if holder]
    if not holders:
        return dice.choice(_VALUES)
    holder = dice.choice(holders)
    key = dice.choice(list(holder)) if isinstance(holder, dict) else dice.randrange(len(holder))
    kind = dice.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[dice.choice(("a", "", "../a", "__class__", "name", key + key))] = holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == 2 and isinstance(holder[key], int | float):
        holder[key] = dice.choice((holder[key] + 1, -holder[key], holder[key] * 10**6, holder[key] // 2))
    elif kind == 3:
        other = dice.choice(holders)
        holder[key] = json.loads(json.dumps(other))
    elif kind == 4:
        for _ in range(dice.choice((1, 3, 200))):
            holder[key] = [holder[key]]
    elif kind == 5 and isinstance(holder[key], str):
        place = dice.randrange(len(holder[key]) + 1)
        holder[key] = (
            holder[key][:place] + dice.choice(("x", "/", "..", ":", "\n", "é")) + holder[key][place:]
        )
    else:
        holder[key] = dice.choice(_VALUES)
    return value


def _json(content: bytes, dice: random.Random) -> bytes:
    return json.dumps(change_tree(json.loads(content), dice)).encode()


def _json_lines(content: bytes, dice: random.Random) -> bytes:
    lines = content.splitlines()
    place = dice.randrange(len(lines))
    lines[place] = _json(lines[place], dice)
    return b"\n".join(lines)


def _yaml(content: bytes, dice: random.Random) -> bytes:
    return yaml.safe_dump(change_tree(yaml.safe_load(content), dice)).encode()


def _safetensors(content: bytes, dice: random.Random) -> bytes:
    """The header changed, its length right again."""
    (length,) = struct.unpack_from("<Q", content)
    header = _json(content[8 : 8 + length], dice)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def _zip(content: bytes, dice: random.Random) -> bytes:
    """One record changed, stored or compressed, the archive whole again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = dice.choice(list(records))
    records[name] = dice.choice((records[name], bytes(10**6), b""))
    records[name] = mutate(records[name], name, dice)
    kind = dice.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", kind) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return written.getvalue()


def _gzip(content: bytes, dice: random.Random) -> bytes:
    inside = gzip.decompress(content)
    if dice.randrange(8) == 0:
        return gzip.compress(inside + b" " * 2**22, 1)
    return gzip.compress(_json_lines(inside, dice), 1)


def _onnx(content: bytes, dice: random.Random) -> bytes:
    """One field of one message changed, somewhere below the graph."""
    import onnx

    model = onnx.load_model_from_string(content)
    messages = [model.graph]
    for message in messages:  # grows while it is gone through
        for field, value in message.ListFields():
            if field.message_type is not None:
                messages += list(value) if hasattr(value, "add") else [value]
    message = dice.choice(messages)
    field, value = dice.choice(message.ListFields())
    if hasattr(value, "append") and field.message_type is None:
        value[dice.randrange(len(value))] = _like(value[0], dice)
    elif field.message_type is not None and hasattr(value, "add"):
        value.add().CopyFrom(dice.choice(list(value)))
        if dice.random() < 0.5:
            del value[dice.randrange(len(value))]
    elif field.message_type is not None:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _like(value, dice))
    return bytes(model.SerializeToString())


def _like(value: Any, dice: random.Random) -> Any:
    if isinstance(value, str):
        return dice.choice(("", "../x", value + "x", value[:1], "weight", "a" * 300))
    if isinstance(value, bytes):
        return _bytes(value, dice)
    if isinstance(value, float):
        return dice.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    return dice.choice((0, 1, -1, 2, 4, 2**31 - 1, value + 1, -value))


_CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".jsonl": _json_lines,
    ".lines.json": _json_lines,
    ".json.gz": _gzip,
    ".json": _json,
    ".yaml": _yaml,
    ".safetensors": _safetensors,
    ".pth": _zip,
    ".npz": _zip,
    ".onnx": _onnx,
}
