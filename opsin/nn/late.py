"""Matrices that take their values from the checkpoint's files when they are first used."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from opsin.checkpoint.safetensors import OpenFile
from opsin.kernels import Activation
from opsin.kernels.packed import DenseMatrix, Packed


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a matrix that an open file holds, one after another from `offset` on."""

    file: OpenFile
    offset: int
    rows: int
    dtype: torch.dtype
    row: int
    spread: int


class LateMatrix:
    """A matrix that takes no memory before its first product, where its values can wait.

    What stays unused, as a tower does without pictures, is never read. The files are held open
    until then: they may be removed, but not written over.
    """

    def __init__(self, matrix: Packed) -> None:
        self.n = matrix.n
        self.k = matrix.k
        self.format = matrix.format
        self._matrix = matrix
        self._stored: list[_Rows] = []
        self._is_read = False
        self._lock = threading.Lock()

    @property
    def is_waiting(self) -> bool:
        """Whether values of it were not read yet."""
        return bool(self._stored) and not self._is_read

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return self._matrix.nbytes

    def wait_for(
        self, file: OpenFile, offset: int, rows: int, dtype: torch.dtype, row: int, spread: int
    ) -> None:
        """Put rows of an open file when they are needed, as `fill_file` would now."""
        self._stored.append(_Rows(file, offset, rows, dtype, row, spread))

    def now(self) -> Packed:
        """The matrix itself, with all its values.

        Raises what reading the files raises; the next use tries again.
        """
        if self.is_waiting:
            with self._lock:
                for part in self._stored:
                    number = part.file.number
                    self._matrix.fill_file(
                        number, part.offset, part.rows, part.dtype, part.row, part.spread
                    )
                self._is_read = True
        return self._matrix

    def release(self) -> None:
        """Hold no memory until the next use for values that are as a file has them."""
        if self._stored and isinstance(self._matrix, DenseMatrix):
            self._matrix.release()
            self._is_read = False

    def fill(self, weight: Tensor, row: int = 0, *, spread: int = 1) -> None:
        """Put weight (rows, k) at `row`; spread 2 leaves every other sixteen rows for its pair."""
        self._matrix.fill(weight, row, spread=spread)

    def map(self, weight: Tensor, row: int = 0, *, spread: int = 1) -> bool:
        """Read weight (rows, k) where it lies, as `fill` would place it; False if it cannot."""
        return self._matrix.map(weight, row, spread=spread)

    def fill_file(
        self, file: int, offset: int, rows: int, dtype: torch.dtype, row: int, spread: int
    ) -> bool:
        """Put rows from an open file, where they lie one after another; False if it cannot."""
        return self._matrix.fill_file(file, offset, rows, dtype, row, spread)

    def fill_affine(
        self,
        codes: Tensor,
        scales: Tensor,
        biases: Tensor,
        bits: int,
        row: int = 0,
        *,
        spread: int = 1,
    ) -> None:
        """Put MLX codes (rows, k * bits / 32) uint32 with scales and biases (rows, k / group)."""
        self._matrix.fill_affine(codes, scales, biases, bits, row, spread=spread)

    def fill_bias(self, bias: Tensor, row: int = 0, *, spread: int = 1) -> None:
        """Put the bias (rows,) that products add."""
        self._matrix.fill_bias(bias, row, spread=spread)

    def multiply(self, x: Tensor, *, activation: Activation | None = None) -> Tensor:
        """activation(x (rows, k) times the transpose, plus the bias): (rows, n) in x's dtype."""
        return self.now().multiply(x, activation=activation)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows as an embedding: (count, k)."""
        return self.now().rows(indices, dtype)
