"""Quantised checkpoints written: what each tensor becomes, read and written band by band."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsin.checkpoint.safetensors import StoredTensor
from opsin.checkpoint.shards import Planned, Shards
from opsin.quant.affine import encode
from opsin.quant.mlx import band

BAND_BYTES = 1 << 21  # read at once where rows lie apart
BF16 = torch.bfloat16
FEW = 1 << 15  # weights that a thread quantises at once: torch leaves them to one, in its cache


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of a new checkpoint: what it is made from, and how it is kept.

    sources: the tensor as it was, or several that are stacked on a new first axis. transposed:
    with its last two axes swapped; then `rows` of its last axis but one are kept. channels_last:
    its second axis goes last, as MLX stores convolutions. `offset` is added. bits, in groups of
    `group` columns: 0 for values of `dtype`, or of the stored dtype.
    """

    name: str
    sources: tuple[StoredTensor, ...]
    transposed: bool = False
    rows: tuple[int, int] | None = None
    channels_last: bool = False
    offset: float = 0.0
    bits: int = 0
    group: int = 0
    dtype: torch.dtype | None = None

    @property
    def layer(self) -> str:
        """The name without what says that it is a weight."""
        return self.name.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        values = torch.empty(self.sources[0].shape, device="meta")
        stacked = () if len(self.sources) == 1 else (len(self.sources),)
        return (*stacked, *self._arranged(values).shape)

    @property
    def kept_dtype(self) -> torch.dtype:
        """The type of its values, or of its scales."""
        stored = self.dtype or self.sources[0].dtype
        wide = stored not in (torch.float16, torch.bfloat16)
        return torch.bfloat16 if self.bits and wide else stored

    def planned(self) -> list[Planned]:
        """The tensors that it is on disk: itself, or codes, scales and biases."""
        if not self.bits:
            return [Planned(self.name, self.kept_dtype, self.shape)]
        *rows, columns = self.shape
        groups = (*rows, columns // self.group)
        return [
            Planned(f"{self.layer}.weight", torch.uint32, (*rows, columns * self.bits // 32)),
            Planned(f"{self.layer}.scales", self.kept_dtype, groups),
            Planned(f"{self.layer}.biases", self.kept_dtype, groups),
        ]

    def bands(self) -> Iterator[Tensor]:
        """Its values from first to last, a few rows of the first axis of a source at a time."""
        for source in self.sources:
            if not source.shape:
                yield source.read() + self.offset if self.offset else source.read()
                continue
            row = math.prod(source.shape[1:]) * source.dtype.itemsize
            step = max(1, BAND_BYTES // max(row, 1))
            for first in range(0, source.shape[0], step):
                part = band(source, first, min(first + step, source.shape[0])).read()
                yield self._arranged(part) + self.offset if self.offset else self._arranged(part)

    def _arranged(self, values: Tensor) -> Tensor:
        if self.transposed:
            values = values.mT
        if self.rows is not None:
            values = values[..., slice(*self.rows), :]
        return values.movedim(1, -1) if self.channels_last else values

    def write(self, shards: Shards, pool: ThreadPoolExecutor) -> None:
        """Read, arrange, quantise and write it."""
        planned = self.planned()
        for values in self.bands():
            if not self.bits:
                shards.append(self.name, values.to(self.kept_dtype))
                continue
            flat = values.flatten(0, -2)
            for parts in pool.map(self._encode, flat.split(max(1, FEW // flat.shape[1]))):
                for place, part in zip(planned, parts, strict=True):
                    shards.append(place.name, part)

    def _encode(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return encode(values, self.bits, self.group, self.kept_dtype)


def write_all(
    outputs: Sequence[Output], shards: Shards, on_progress: Callable[[int, int], None] | None
) -> None:
    """Fill the files of a checkpoint; on_progress hears the source's bytes done and to do."""
    sizes = [sum(source.num_bytes for source in output.sources) for output in outputs]
    done, total = 0, sum(sizes)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for output, size in zip(outputs, sizes, strict=True):
            output.write(shards, pool)
            done += size
            if on_progress is not None:
                on_progress(done, total)


def quantization(outputs: Sequence[Output], bits: int, group: int) -> dict[str, Any]:
    """What config.json says of quantised outputs: bits and group size, and whatever has others.

    mlx-vlm takes a matrix of which 64 is no divisor for a plain one, unless it is named.
    """
    usual: dict[str, Any] = {"group_size": group, "bits": bits}
    own: dict[str, Any] = {}
    for output in outputs:
        stated = {"group_size": output.group, "bits": output.bits}
        if output.bits and (stated != usual or math.prod(output.shape) % 64):
            own[output.layer] = stated
    return {**usual, "mode": "affine", **own}
