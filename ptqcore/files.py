"""Files written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ptqcore.errors import ArtifactError, PtqError
from ptqcore.tensor_file import tensor_file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says when `path` cannot be written into one `ArtifactError` sentence."""
    try:
        yield
    except PtqError:
        raise
    except Exception as error:
        # Libraries written in Rust (tokenizers) raise a bare Exception for what the system says.
        if not isinstance(error, OSError | SafetensorError) and "(os error" not in str(error):
            raise
        raise ArtifactError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return "the disk is full; free some space or choose another --output, then run again with --resume"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}; choose another --output"
    return str(error)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: a temporary file, flushed to disk, renamed."""
    with writing(path), _replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=True) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically; the same tensors give the same bytes.

    Raises:
        ArtifactError: if it cannot be written.
    """
    with writing(path), _replacing(path) as temporary, open(temporary, "wb") as file:
        for part in tensor_file(tensors, metadata):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
        _flush_folder(path.parent)
    finally:
        with suppress(OSError):  # what went wrong before says more
            temporary.unlink()


def _flush_folder(path: Path) -> None:
    """Have the names in a folder on disk, so that a loss of power does not undo a rename."""
    if os.name == "nt":  # there is no handle of a folder there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_files(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, in their order, in hexadecimal.

    Raises:
        OSError: if one cannot be read.
    """
    total = hashlib.sha256()
    for path in paths:
        total.update(bytes.fromhex(digest(path)))
    return total.hexdigest()


def folder(path: Path, empty: bool = False) -> Path:
    """The folder `path`, made if it is missing; with `empty`, what was in it is removed.

    Raises:
        ArtifactError: if that fails.
    """
    with writing(path):
        if empty:
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
    return path


def remove(path: Path) -> None:
    """Remove a folder and everything in it, if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Make the folder if it is missing, and try to write into it.

    Raises:
        ArtifactError: if that fails.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("x")
        probe.unlink()


def move_into(source: Path, target: Path, last: str, instead_of: Iterable[str] = ()) -> None:
    """Move every entry of `source` into `target`, replacing what has the same name.

    Whatever happens in between, `last` is only there while everything beside it is of one kind: an old one
    goes first, and the new one comes last.

    Args:
        source: the folder that is emptied.
        target: the folder that is filled.
        last: the entry that makes the others valid.
        instead_of: names that go from `target` even if nothing takes their place.

    Raises:
        ArtifactError: if that fails.
    """
    with writing(target):
        (target / last).unlink(missing_ok=True)
        _flush_folder(target)
        for name in instead_of:
            if (target / name).is_dir():
                shutil.rmtree(target / name)
        for entry in sorted(source.iterdir(), key=lambda entry: (entry.name == last, entry.name)):
            destination = target / entry.name
            if destination.is_dir() and not destination.is_symlink():
                shutil.rmtree(destination)
            if entry.name == last:
                _flush_folder(target)
            os.replace(entry, destination)
        _flush_folder(target)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the system frees it when the process ends, however it ends.

    Raises:
        ArtifactError: if another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    path = folder / ".lock"
    with writing(path):
        file = open(path, "w")  # noqa: SIM115 - held open, and closed below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.stat().st_ino == os.fstat(file.fileno()).st_ino  # else its holder has removed it
        except OSError:
            held = False
        if not held:
            raise ArtifactError(
                f"another run is writing to {folder}: wait for it or choose another --output"
            )
        try:
            yield
        finally:
            with suppress(OSError):  # a folder may have become read-only meanwhile
                path.unlink()
