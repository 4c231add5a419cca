"""Weights written as safetensors files of bounded size, each tensor filled piece after piece."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from opsin.checkpoint.safetensors import DTYPES

SHARD_BYTES = 5 * 10**9
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class _Place:
    """Where the next bytes of a tensor go, and how many are still to come."""

    file: BinaryIO
    at: int
    left: int


class Shards:
    """The weight files of a checkpoint folder, laid out beforehand; a context that closes them.

    groups: tensors that stay in one file. `append` fills each tensor from its first row on, in any
    order among tensors. metadata: what each file says of itself. Raises OSError where a file
    cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        groups: Sequence[Sequence[Planned]],
        metadata: dict[str, str],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = folder
        self.files: dict[str, list[Planned]] = {}
        self.num_bytes = sum(planned.num_bytes for group in groups for planned in group)
        shards = _divided(groups, shard_bytes)
        for i, shard in enumerate(shards, 1):
            alone = len(shards) == 1
            name = "model.safetensors" if alone else f"model-{i:05}-of-{len(shards):05}.safetensors"
            # The widest numbers first: each tensor begins at a multiple of its items' size.
            self.files[name] = sorted(shard, key=lambda planned: -planned.dtype.itemsize)
        self._metadata = metadata
        self._places: dict[str, _Place] = {}
        self._open = ExitStack()

    def __enter__(self) -> Shards:
        for name, shard in self.files.items():
            file = self._open.enter_context((self.folder / name).open("wb"))
            header = _header(shard, self._metadata)
            file.write(header)
            at = len(header)
            for planned in shard:
                self._places[planned.name] = _Place(file, at, planned.num_bytes)
                at += planned.num_bytes
            file.truncate(at)
        return self

    def append(self, name: str, values: Tensor) -> None:
        """Write the next rows of a tensor."""
        place = self._places[name]
        data = values.contiguous().view(-1).view(torch.uint8).numpy().data
        assert len(data) <= place.left, f"too much for {name}"
        place.file.seek(place.at)
        place.file.write(data)
        place.at += len(data)
        place.left -= len(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._open:
            if error is not None:
                return
            unfilled = [name for name, place in self._places.items() if place.left]
            assert not unfilled, f"{unfilled[0]} was not filled"
            for file in {id(place.file): place.file for place in self._places.values()}.values():
                file.flush()
                os.fsync(file.fileno())
            if len(self.files) > 1:
                self._write_index()

    def _write_index(self) -> None:
        where = {planned.name: name for name, shard in self.files.items() for planned in shard}
        index = {
            "metadata": {"total_size": self.num_bytes},
            "weight_map": dict(sorted(where.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _divided(groups: Sequence[Sequence[Planned]], shard_bytes: int) -> list[list[Planned]]:
    """Groups one after another in files of at most so many bytes, where one group is not more."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for group in groups:
        size = sum(planned.num_bytes for planned in group)
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    return shards


def _header(shard: Sequence[Planned], metadata: dict[str, str]) -> bytes:
    """The header of a safetensors file, padded to whole words."""
    table: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for planned in shard:
        end = at + planned.num_bytes
        table[planned.name] = {
            "dtype": NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
