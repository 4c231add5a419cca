"""Columns mixed in blocks before they are rounded, so that none far out costs the others bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LANES = 16


def rotate(x: Tensor) -> Tensor:
    """x (..., k), k a multiple of 32, times a Hadamard matrix over blocks of columns; float32.

    A block is of 64 columns, of 32 where k is no multiple of 64. The matrix is its own inverse, and
    a product of two rotated sides is the product of the two. The order of the sums is that of the
    native kernels (rotate.h): the same bits.
    """
    block = 64 if x.shape[-1] % 64 == 0 else 32
    parts = list(x.float().unflatten(-1, (-1, block // LANES, LANES)).unbind(-2))
    half = 1
    while half < len(parts):  # (..., blocks, lanes) of one vector of a block each
        for first in range(0, len(parts), 2 * half):
            for i in range(first, first + half):
                parts[i], parts[i + half] = parts[i] + parts[i + half], parts[i] - parts[i + half]
        half *= 2
    mixed = torch.stack(parts, dim=-2)
    signs = _signs().to(mixed)
    out = mixed[..., :1].expand_as(mixed)
    for j in range(1, LANES):
        out = out + mixed[..., j : j + 1] * signs[j]
    return (out * torch.tensor(1 / math.sqrt(block), dtype=torch.float32)).flatten(-3)


def _signs() -> Tensor:
    """(16, 16): -1 where row and column have an odd number of bits in common."""
    rows = [[(i & j).bit_count() % 2 for j in range(LANES)] for i in range(LANES)]
    return 1.0 - 2.0 * torch.tensor(rows, dtype=torch.float32)
