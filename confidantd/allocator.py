"""What the C library keeps of memory that was freed: less of it, where it is glibc."""

from __future__ import annotations

import contextlib
import ctypes

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGE_BYTES = 256 * 1024


def keep_little() -> None:
    """For a process that idles most of the time: what it used at work goes back to the system.

    Otherwise each thread that ever handled a large buffer keeps as much for ever (2 MB a thread).
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_ARENA_MAX, 1)
        library.mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        library.mallopt(_TRIM_THRESHOLD, _LARGE_BYTES)


def give_back_freed() -> None:
    """Return to the system what was freed between arrays that live on."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
