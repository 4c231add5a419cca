"""A safetensors file opened without trust: header checked against the file, tensors read one by
one.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsin.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
PIECE_BYTES = 4 << 20  # larger tensors are read by several threads, in pieces of this size
READERS = 2
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, not yet read: `start` is its first byte's offset in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_into(self, out: Tensor) -> None:
        """Fill `out`, of the same number of elements, casting if its dtype is another.

        Where out is contiguous, on the CPU and of the stored dtype, bytes go straight into it;
        otherwise one copy of this tensor exists for a moment.
        """
        direct = out.is_contiguous() and out.device.type == "cpu" and out.dtype == self.dtype
        buffer = out if direct else torch.empty(self.shape, dtype=self.dtype)
        view = buffer.view(-1).view(torch.uint8).numpy().data if buffer.numel() else memoryview(b"")
        with self.path.open("rb", buffering=0) as file:
            pieces = range(0, self.num_bytes, PIECE_BYTES)
            if len(pieces) < 2:
                self._read(file.fileno(), view, 0)
            else:
                with ThreadPoolExecutor(READERS) as pool:
                    parts = [view[at : at + PIECE_BYTES] for at in pieces]
                    list(pool.map(self._read, [file.fileno()] * len(pieces), parts, pieces))
        if not direct:
            out.copy_(buffer.view(out.shape))

    def _read(self, file: int, out: memoryview, at: int) -> None:
        """Fill `out` with the bytes from the tensor's byte `at` on."""
        done = 0
        while done < len(out):
            count = os.preadv(file, [out[done:]], self.start + at + done)
            if not count:
                raise _bad(self.path, f"it ends inside tensor {self.name!r}")
            done += count

    def read(self) -> Tensor:
        """The tensor as stored."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out


def _bad(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"Cannot read the weights in {path.name}", why=why, remedy="Download the checkpoint again"
    )


class OpenFile:
    """A file that stays open, to be read by its `number`, for as long as this lives."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)


@dataclass(frozen=True, slots=True)
class MappedRange:
    """The bytes of a mapped file from `start` to `end`, to which nothing was written."""

    memory: mmap.mmap
    start: int
    end: int

    def release(self) -> None:
        """Keep none of their pages in this process until they are used again.

        The system has the file in its own cache for as long as memory allows, so that they are back
        at once.
        """
        first = -(-self.start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (self.end - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if size > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.memory.madvise(mmap.MADV_DONTNEED, first, size)


class MappedFiles:
    """Files mapped once each, for the tensors that are used where they lie.

    What is written to them stays in this process. `opened` are those whose tensors are read later.
    """

    def __init__(self) -> None:
        self.files: dict[Path, mmap.mmap | None] = {}
        self.opened: dict[Path, OpenFile] = {}

    def opened_for(self, tensor: StoredTensor) -> OpenFile:
        """The file that holds a tensor, for it to be read when it is needed."""
        if tensor.path not in self.opened:
            self.opened[tensor.path] = OpenFile(tensor.path)
        return self.opened[tensor.path]

    def of(self, tensor: StoredTensor) -> Tensor | None:
        """A tensor's own bytes, each page read when it is first used if the system has not yet.

        None where it does not begin at a multiple of its items' size, or the file cannot be mapped.
        """
        if tensor.start % tensor.dtype.itemsize:
            return None
        if tensor.path not in self.files:
            self.files[tensor.path] = _mapped(tensor.path)
        memory = self.files[tensor.path]
        if memory is None:
            return None
        end = tensor.start + tensor.num_bytes
        if len(memory) < end:
            raise _bad(tensor.path, f"it ends inside tensor {tensor.name!r}")
        _read_ahead(memory, tensor.start, end)
        count = math.prod(tensor.shape)
        if not count:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=tensor.start)
        return flat.view(tensor.shape)

    def range_of(self, tensor: StoredTensor) -> MappedRange | None:
        """Where the bytes of a tensor that `of` gave lie."""
        memory = self.files.get(tensor.path)
        if memory is None:
            return None
        return MappedRange(memory, tensor.start, tensor.start + tensor.num_bytes)


def _mapped(path: Path) -> mmap.mmap | None:
    """The bytes of a file; None on a file system that maps nothing."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError:
        return None


def _read_ahead(memory: mmap.mmap, start: int, end: int) -> None:
    """Let the system read these bytes in the background, in one go rather than page by page."""
    if not hasattr(mmap, "MADV_WILLNEED"):
        return
    with suppress(OSError):  # it is advice: a system may not take it
        for at in range(start - start % mmap.PAGESIZE, end, PIECE_BYTES):
            memory.madvise(mmap.MADV_WILLNEED, at, min(PIECE_BYTES, end - at))


def stored_tensors(path: Path) -> Iterator[StoredTensor]:
    """Every tensor of a safetensors file, in the order of their bytes.

    Raises CheckpointError if the header lies: lengths, offsets and shapes must agree with each
    other and lie inside the file.
    """
    header, start, size = _header(path)
    header.pop("__metadata__", None)
    entries = [_entry(path, name, value, start, size) for name, value in header.items()]
    yield from sorted(entries, key=lambda entry: entry.start)


def stored_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; CheckpointError if it is none."""
    stated = _header(path)[0].get("__metadata__")
    if not isinstance(stated, dict):
        return {}
    return {key: value for key, value in stated.items() if isinstance(value, str)}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """A file's header, its first byte of data, and its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _bad(path, f"it is only {size} bytes long")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise _bad(path, f"its header claims {length} bytes of a file of {size}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _bad(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a JSON object")
    return header, 8 + length, size


def _entry(path: Path, name: str, value: Any, data_start: int, size: int) -> StoredTensor:
    try:
        dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
        first, last = value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise _bad(path, f"the header entry of {name!r} is malformed") from error
    numbers = (*shape, first, last)
    sizes = all(type(n) is int and n >= 0 for n in numbers)
    # A side of 0 hides the others from the bytes, but not from what computes strides.
    if not sizes or math.prod(n or 1 for n in shape) >= 2**60:
        raise _bad(path, f"the header entry of {name!r} holds something that is no size")
    entry = StoredTensor(name, dtype, shape, path, data_start + first)
    if last - first != entry.num_bytes or data_start + last > size:
        raise _bad(path, f"tensor {name!r} does not fit the bytes that the header gives it")
    return entry
