"""How much memory there is and was used, and giving back what is not."""

from __future__ import annotations

import mmap
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from opsin.kernels.memory import give_back_freed, libc

_LIBRARY = re.compile(r"\.so(\.\d+)*$")  # and what follows is its version


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


def give_back_startup() -> None:
    """As `give_back_freed`, and the code of libraries, most of which only their start-up ran.

    The files stay in the system's cache, so that what still runs is back at once.
    """
    give_back_freed()
    library = libc()
    if library is None:
        return
    with suppress(OSError):  # a system that does not show a process its pages
        for start, size in _unwritten_code():
            library.madvise(start, size, mmap.MADV_DONTNEED)


def _unwritten_code() -> Iterator[tuple[int, int]]:
    """Address and size of what is mapped to be read only from libraries, unless it was written to.

    That is their code and constants.
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        for line in maps:
            place, access, _, _, _, *path = line.split(maxsplit=5)
            if not path or access not in ("r-xp", "r--p") or not _LIBRARY.search(path[0]):
                continue
            start, end = (int(address, 16) for address in place.split("-"))
            if not _has_own_pages(pages, start // mmap.PAGESIZE, end // mmap.PAGESIZE):
                yield start, end - start


def _has_own_pages(pages: BinaryIO, first: int, end: int) -> bool:
    """Whether any of some pages is no longer its file's: a debugger's marks may be in it.

    `pages` has eight bytes a page: bits 63 and 62 are set if it has contents, 61 if a file's.
    """
    pages.seek(8 * first)
    facts = np.frombuffer(pages.read(8 * (end - first)), dtype=np.uint64) >> np.uint64(61)
    return len(facts) < end - first or bool(((facts > 1) & (facts % 2 == 0)).any())
