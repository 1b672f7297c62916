"""Memory that a process gives back and asks for again at every step, kept. Knows no model.

glibc hands blocks of more than 32 MB back to the system as soon as they are freed, and the system fills every page with zeros when it is next
touched: in a step on the CPU these are tenths of the time. CUDA's allocator keeps what it has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's settings
_MOST = 2**31 - 1  # bytes
_USUAL = 32 << 20  # bytes; what the threshold has become in a process that has freed so large a block (glibc's DEFAULT_MMAP_THRESHOLD_MAX)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Inside, what is freed stays with the process; afterwards it is given back. Without glibc nothing happens."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _MOST // 2)
    library.mallopt(_TRIM_THRESHOLD, _MOST)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL)
        library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
        library.malloc_trim(0)
