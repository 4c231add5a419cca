"""Weight matrices in a format of their own: what any of them can do, and the plain torch one."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from opsin.errors import EngineError
from opsin.kernels.interface import Activation, Kernels
from opsin.quant.affine import dequantise, quantise, unpack_codes
from opsin.quant.formats import WIDTHS, Format, Kind
from opsin.quant.rotation import rotate


class Packed(Protocol):
    """A weight (n, k), with the bias of its products if it was given one."""

    n: int
    k: int
    format: Format

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        ...

    def fill(self, weight: Tensor, row: int = 0, *, spread: int = 1) -> None:
        """Put weight (rows, k) at `row`; spread 2 leaves every other sixteen rows for its pair."""
        ...

    def map(self, weight: Tensor, row: int = 0, *, spread: int = 1) -> bool:
        """Read weight (rows, k) where it lies, as `fill` would place it; False if it cannot."""
        ...

    def fill_file(
        self, file: int, offset: int, rows: int, dtype: torch.dtype, row: int, spread: int
    ) -> bool:
        """Put rows from an open file, where they lie one after another; False if it cannot."""
        ...

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
        ...

    def fill_bias(self, bias: Tensor, row: int = 0, *, spread: int = 1) -> None:
        """Put the bias (rows,) that products add."""
        ...

    def multiply(self, x: Tensor, *, activation: Activation | None = None) -> Tensor:
        """activation(x (rows, k) times the transpose, plus the bias): (rows, n) in x's dtype."""
        ...

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows as an embedding: (count, k)."""
        ...


class DenseMatrix:
    """A weight as it is, of one type, on the CPU.

    It has no memory before it is filled, and then pages of its own: among what products need for a
    moment, it would keep the C library from giving that back.
    """

    def __init__(self, kernels: Kernels, n: int, k: int, dtype: torch.dtype) -> None:
        self.kernels = kernels
        self.format = Format("bf16")
        self.n = n
        self.k = k
        self.weight = torch.empty(0, dtype=dtype)
        self.bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.n * self.k * self.weight.dtype.itemsize

    def release(self) -> None:
        """Be as before it was filled, but for the bias."""
        self.weight = self.weight.new_empty(0)

    def fill(self, weight: Tensor, row: int = 0, *, spread: int = 1) -> None:
        """Put weight (rows, k) at `row`."""
        self._place(row, weight.shape[0], spread).copy_(weight)

    def map(self, weight: Tensor, row: int = 0, *, spread: int = 1) -> bool:
        """It takes values only."""
        return False

    def fill_file(
        self, file: int, offset: int, rows: int, dtype: torch.dtype, row: int, spread: int
    ) -> bool:
        """Put rows from an open file, where they lie one after another; True."""
        place = self._place(row, rows, spread)
        values = place if dtype == place.dtype else torch.empty(rows, self.k, dtype=dtype)
        bytes_left = values.view(-1).view(torch.uint8).numpy().data
        while bytes_left:
            count = os.preadv(file, [bytes_left], offset)
            if not count:
                raise EngineError("a matrix cannot be read", why="its file ends inside it")
            bytes_left, offset = bytes_left[count:], offset + count
        if values is not place:
            place.copy_(values)
        return True

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
        """Put the values that MLX codes stand for."""
        whole = dequantise(unpack_codes(codes, bits, self.k), scales, biases)
        self.fill(whole, row, spread=spread)

    def fill_bias(self, bias: Tensor, row: int = 0, *, spread: int = 1) -> None:
        """Put the bias (rows,) that products add."""
        if self.bias is None:
            self.bias = torch.zeros(self.n, dtype=bias.dtype)
        self.bias[row : row + bias.numel()] = bias

    def multiply(self, x: Tensor, *, activation: Activation | None = None) -> Tensor:
        """activation(x (rows, k) times the transpose, plus the bias): (rows, n) in x's dtype."""
        return self.kernels.linear(x, self.weight, self.bias, activation)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows as an embedding: (count, k)."""
        return self.weight[indices].to(dtype)

    def _place(self, row: int, rows: int, spread: int) -> Tensor:
        """The rows to fill, with memory."""
        assert spread == 1, "only native kernels read gate and up rows that alternate"
        if not self.weight.numel():
            dtype = self.weight.dtype
            pages = mmap.mmap(-1, max(1, self.nbytes), access=mmap.ACCESS_COPY)
            count = self.n * self.k
            self.weight = torch.frombuffer(pages, dtype=dtype, count=count).view(self.n, self.k)
        return self.weight[row : row + rows]


class PlainMatrix:
    """A quantised weight on any device, made whole again for each product."""

    def __init__(self, form: Format, n: int, k: int, device: torch.device) -> None:
        self.format = form
        self.n = n
        self.k = k
        self.codes = torch.zeros(n, k * WIDTHS[form.kind] // 8, dtype=torch.uint8, device=device)
        shape = (n, k // (form.group or k))
        kept = torch.float32 if form.scale_dtype == torch.uint8 else form.scale_dtype
        self.scales = torch.zeros(shape, dtype=kept, device=device)
        self.biases = torch.zeros(shape, dtype=kept, device=device)
        self.bias: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.codes.nbytes + self.scales.nbytes + self.biases.nbytes

    def fill(self, weight: Tensor, row: int = 0, *, spread: int = 1) -> None:
        """Quantise weight (rows, k) and put it at `row`."""
        self._put(*quantise(weight, self.format), row, spread)

    def map(self, weight: Tensor, row: int = 0, *, spread: int = 1) -> bool:
        """It takes values only."""
        return False

    def fill_file(
        self, file: int, offset: int, rows: int, dtype: torch.dtype, row: int, spread: int
    ) -> bool:
        """It takes values only."""
        return False

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
        self._put(unpack_codes(codes, bits, self.k), scales, biases, row, spread)

    def _put(self, codes: Tensor, scales: Tensor, biases: Tensor, row: int, spread: int) -> None:
        assert spread == 1, "only native kernels read gate and up rows that alternate"
        rows = slice(row, row + codes.shape[0])
        self.codes[rows] = _joined(codes, self.format.kind).to(self.codes.device)
        self.scales[rows] = scales.to(self.scales)
        self.biases[rows] = biases.to(self.biases)

    def fill_bias(self, bias: Tensor, row: int = 0, *, spread: int = 1) -> None:
        """Put the bias (rows,) that products add."""
        if self.bias is None:
            self.bias = torch.zeros(self.n, device=self.codes.device)
        self.bias[row : row + bias.numel()] = bias

    def multiply(self, x: Tensor, *, activation: Activation | None = None) -> Tensor:
        """activation(x (rows, k) times the transpose, plus the bias): (rows, n) in x's dtype."""
        whole = self._kept(torch.arange(self.n, device=self.codes.device)).to(x.dtype)
        x = rotate(x).to(x.dtype) if self.format.rotated else x
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return Kernels().linear(x, whole, bias, activation)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows as an embedding: (count, k)."""
        kept = self._kept(indices)
        return (rotate(kept) if self.format.rotated else kept).to(dtype)

    def _kept(self, indices: Tensor) -> Tensor:
        """Rows as they were rounded: (count, k), float32."""
        codes = _apart(self.codes[indices], self.format.kind)
        return dequantise(codes, self.scales[indices], self.biases[indices])


def _joined(codes: Tensor, kind: Kind) -> Tensor:
    """Codes (rows, k) as bytes that are full: some in the lower bits, others above those."""
    bits = WIDTHS[kind]
    size, parts = _together(bits)
    if size == 1:
        return codes
    together = codes.unflatten(1, (-1, size)).int()
    shifts = torch.arange(size, device=codes.device, dtype=torch.int32)
    above = (together[..., parts:] << bits * shifts[: size - parts]).sum(dim=-1, keepdim=True)
    spare = above >> (8 - bits) * shifts[:parts]
    return (together[..., :parts] | spare << bits).to(torch.uint8).flatten(1)


def _apart(joined: Tensor, kind: Kind) -> Tensor:
    """The codes (rows, k) that `_joined` put into bytes."""
    bits = WIDTHS[kind]
    size, parts = _together(bits)
    if size == 1:
        return joined
    shifts = torch.arange(size, device=joined.device, dtype=torch.int32)
    together = joined.unflatten(1, (-1, parts)).int()
    spare = (together >> bits) << (8 - bits) * shifts[:parts]
    above = spare.sum(dim=-1, keepdim=True) >> bits * shifts[: size - parts]
    return (torch.cat((together, above), dim=-1) & (2**bits - 1)).to(torch.uint8).flatten(1)


def _together(bits: int) -> tuple[int, int]:
    """How many codes fill bytes, and how many bytes."""
    return 8 // math.gcd(8, bits), bits // math.gcd(8, bits)


def packed_experts(x: Tensor, experts: Sequence[Packed], expert_ids: Tensor) -> Tensor:
    """Row i of x (rows, k) times the matrix of expert expert_ids[i], which rise: (rows, n)."""
    counts = expert_ids.bincount(minlength=len(experts)).tolist()
    parts = x.split(counts)
    used = [(e, part) for e, part in zip(experts, parts, strict=True) if len(part)]
    return (
        torch.cat([e.multiply(part) for e, part in used]) if used else x.new_empty(0, experts[0].n)
    )
