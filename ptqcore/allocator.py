"""The C library's allocator: whether it keeps the memory of tensors that are freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 * 1024 * 1024
_SMALL = 2**18
_short = False


def keep_freed_memory() -> None:
    """Make loops that free and allocate tensors of a few megabytes two to five times as fast (glibc).

    Left alone, glibc gives such blocks back to the system at once, and every new tensor begins with
    page faults. Elsewhere this does nothing.
    """
    if not _short:
        _set(_LARGEST_MMAP_THRESHOLD, 2**30)


def keep_no_freed_memory() -> None:
    """Hand memory back to the system as soon as it is freed, from now on: where there is little (glibc).

    Elsewhere this does nothing.
    """
    global _short
    _short = True
    _set(_SMALL, _SMALL)


def _set(mmap_threshold: int, trim_threshold: int) -> None:
    if sys.platform != "linux":
        return
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        library.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
    except (OSError, AttributeError):
        return


def give_freed_memory_back() -> None:
    """Hand memory that was freed to the system, so that a phase does not pay for those before it (glibc).

    Elsewhere this does nothing.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
