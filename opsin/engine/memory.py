"""How much memory there is and was used, and giving back what is not."""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

MADV_DONTNEED = 4


def physical_memory() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """The most bytes that this process held at once: on a GPU if one was used, else in memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def default_cache_memory(device: torch.device) -> int:
    """Bytes for the key-value cache when nobody said: see EngineLimits.memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * 0.8)
    return physical_memory() // 4


def give_back_freed() -> None:
    """Let the system have what this process has freed, which the C library keeps for itself.

    After something large it is tens of megabytes, and takes milliseconds.
    """
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def give_back_startup() -> None:
    """As `give_back_freed`, and torch's code, most of which only its start-up ran.

    The files stay in the system's cache, so that what still runs is back at once.
    """
    give_back_freed()
    libc = _libc()
    if libc is not None:
        for start, size in _untouched_code(Path(torch.__file__).parent / "lib"):
            libc.madvise(start, size, MADV_DONTNEED)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return None
    try:
        if not os.confstr("CS_GNU_LIBC_VERSION"):
            return None
    except (OSError, ValueError):  # another C library
        return None
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.malloc_trim.argtypes = (ctypes.c_size_t,)
    return libc


def _untouched_code(folder: Path) -> Iterator[tuple[int, int]]:
    """Address and size of the code mapped from libraries in a folder, unless it was written to."""
    start = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        word, *rest = line.split(maxsplit=5)
        if not word.endswith(":"):
            ours = len(rest) == 5 and rest[0] == "r-xp" and Path(rest[4]).parent == folder
            first, last = (int(end, 16) for end in word.split("-"))
            start, size = first, last - first if ours else 0
        elif size and line.startswith("Anonymous:"):
            if rest[0] == "0":  # else a debugger's marks are in it
                yield start, size
            size = 0
