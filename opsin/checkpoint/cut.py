"""Some rows or columns of a stored matrix, read without the rest of it staying in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsin.checkpoint.safetensors import StoredTensor
from opsin.errors import CheckpointError

# Bytes read at once of a matrix of which columns are kept.
CHUNK = 1 << 24
# (first, end) of each run of rows or columns that is kept.
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CutTensor(StoredTensor):
    """The rows and columns of a matrix that lie in some runs; `shape` is what is left of it."""

    rows: Runs = ()
    columns: Runs = ()
    width: int = 0

    def read_into(self, out: Tensor) -> None:
        """Fill `out`, a matrix of the shape that is left, casting if its dtype is another."""
        step = max(1, CHUNK // (self.width * self.dtype.itemsize))
        filled = 0
        for first, end in self.rows:
            for start in range(first, end, step):
                read = self._block(start, min(step, end - start)).read()
                kept = torch.cat([read[:, left:right] for left, right in self.columns], dim=1)
                out[filled : filled + len(kept)].copy_(kept)
                filled += len(kept)

    def _block(self, start: int, count: int) -> StoredTensor:
        """Whole rows of the matrix, as a tensor of their own."""
        place = self.start + start * self.width * self.dtype.itemsize
        return StoredTensor(self.name, self.dtype, (count, self.width), self.path, place)


def cut(
    tensor: StoredTensor, *, rows: Runs | None = None, columns: Runs | None = None
) -> CutTensor:
    """The runs of a stored matrix that are kept; all rows, or all columns, for None.

    Raises CheckpointError for one that is stored in another form than row after row.
    """
    if type(tensor) is not StoredTensor:
        raise CheckpointError(
            "A quantised checkpoint cannot be sliced",
            why=f"tensor {tensor.name} is stored in groups",
            remedy="Slice the checkpoint that it was made from",
        )
    height, width = tensor.shape
    rows, columns = rows or ((0, height),), columns or ((0, width),)
    left = tuple(sum(end - first for first, end in runs) for runs in (rows, columns))
    return CutTensor(
        tensor.name, tensor.dtype, left, tensor.path, tensor.start, rows, columns, width
    )
