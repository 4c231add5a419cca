"""Files of weights in the form that the kernels read: written whole or not at all, and mapped."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy

from opsin.checkpoint.safetensors import stored_metadata, stored_tensors
from opsin.errors import CheckpointError

SUFFIX, UNFINISHED = ".repacked", ".part"
ALIGN, PAGE = 64, 4096
PIECE = 4 << 20  # bytes written at once: whole huge pages
SLACK = 4096  # bytes past the last part, which products may read
SPARE = 1 << 30  # bytes of the disk that are left free
ABANDONED = 3600.0  # seconds after which an unfinished file that nobody writes is removed
END = "end"

# a part's name and its bytes
Part = tuple[str, memoryview]


@dataclass(frozen=True, slots=True)
class Mapping:
    """The parts of a file, in memory for as long as this lives: name to (address, bytes)."""

    memory: numpy.ndarray
    places: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class KeptFile:
    """One file of a cache folder, and which checkpoint it was made from, and how."""

    path: Path
    source: str
    recipe: str
    num_bytes: int


def read(path: Path, key: str) -> Mapping | None:
    """Map a file; None where there is none, or it was made from something else than `key` says.

    Raises CheckpointError for a file that is cut short or is not one of ours.
    """
    if not path.is_file():
        return None
    before = path.stat()
    made_from = stored_metadata(path).get("opsin")
    if made_from is None:
        raise CheckpointError(f"{path.name} is damaged", why="it does not say what it is")
    if made_from != key:
        return None
    parts = list(stored_tensors(path))
    if not parts or parts[-1].name != END or parts[-1].num_bytes != SLACK:
        raise CheckpointError(f"{path.name} is damaged", why="its end is missing")
    with path.open("rb") as file:
        opened = os.fstat(file.fileno())
        if (opened.st_ino, opened.st_mtime_ns) != (before.st_ino, before.st_mtime_ns):
            return None  # replaced while it was looked at
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    array = numpy.frombuffer(memory, dtype=numpy.uint8)
    first = array.ctypes.data
    return Mapping(array, {part.name: (first + part.start, part.num_bytes) for part in parts[:-1]})


def write(path: Path, key: str, source: str, recipe: str, parts: Sequence[Part]) -> int:
    """Write a file whole, then give it its name, in place of any other; its bytes.

    Two processes may do so at once: the last one's stays. Raises OSError where it cannot be.
    """
    header = _header(key, source, recipe, parts)
    total = len(header) + sum(_aligned(len(part)) for _, part in parts) + SLACK
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean(path.parent)
    if shutil.disk_usage(path.parent).free < total + SPARE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    number, name = tempfile.mkstemp(UNFINISHED, f"{path.stem}.", path.parent)
    try:
        with os.fdopen(number, "wb", buffering=0) as file:
            _write_pieces(file.fileno(), _laid_out(header, parts))
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
    return total


def kept_files(folder: Path) -> list[KeptFile]:
    """The files of a cache folder by name, those of other makers left out."""
    found = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            about = stored_metadata(path)
            size = path.stat().st_size
        except (CheckpointError, OSError):
            about, size = {}, 0
        if "opsin" in about:
            source, recipe = about.get("source", ""), about.get("recipe", "")
            found.append(KeptFile(path, source, recipe, size))
    return found


def _aligned(count: int) -> int:
    return math.ceil(count / ALIGN) * ALIGN


def _header(key: str, source: str, recipe: str, parts: Sequence[Part]) -> bytes:
    """The safetensors header, padded so that the first part lies on a page."""
    table: dict[str, object] = {
        "__metadata__": {"opsin": key, "source": source, "recipe": recipe},
    }
    at = 0
    for name, size in [*((name, len(part)) for name, part in parts), (END, SLACK)]:
        table[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += _aligned(size)
    text = json.dumps(table).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return struct.pack("<Q", len(text)) + text


def _laid_out(header: bytes, parts: Sequence[Part]) -> Iterator[memoryview]:
    yield memoryview(header)
    for _, part in parts:
        yield part
        yield memoryview(bytes(_aligned(len(part)) - len(part)))
    yield memoryview(bytes(SLACK))


def _write_pieces(file: int, parts: Iterable[memoryview]) -> None:
    """Write so that the system may keep the file in huge pages: in whole ones, at their places."""
    piece, used = memoryview(bytearray(PIECE)), 0
    for part in parts:
        done = 0
        while done < len(part):
            count = min(len(part) - done, PIECE - used)
            piece[used : used + count] = part[done : done + count]
            done += count
            used += count
            if used == PIECE:
                _write_all(file, piece)
                used = 0
    _write_all(file, piece[:used])


def _write_all(file: int, part: memoryview) -> None:
    done = 0
    while done < len(part):
        done += os.write(file, part[done:])


def _clean(folder: Path) -> None:
    """Remove what was left by processes that ended while they wrote."""
    for path in folder.glob(f"*{UNFINISHED}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()
