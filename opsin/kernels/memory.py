"""Giving memory back that products were done with."""

from __future__ import annotations

import ctypes
import functools
import os
import sys


@functools.cache
def libc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    if sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return None
    try:
        if not os.confstr("CS_GNU_LIBC_VERSION"):
            return None
    except (OSError, ValueError):  # another C library
        return None
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    library.malloc_trim.argtypes = (ctypes.c_size_t,)
    return library


def give_back_freed() -> None:
    """Let the system have what this process has freed, which the C library keeps for itself.

    After something large it is tens of megabytes, and takes milliseconds.
    """
    library = libc()
    if library is not None:
        library.malloc_trim(0)
