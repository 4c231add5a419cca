"""Keys and values at 8 or 4 bits: how rows of a cache are quantised, and read back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedRows:
    """A cache whose blocks hold either plain rows or quantised ones, in the same memory.

    codes (slots, kv_heads, dim * bits / 8) uint8; scales (slots, kv_heads, groups, 2), scale and
    bias of each group, in the model's type; plain (plain slots, kv_heads, dim) is the memory of
    `codes` as plain rows, of which fewer fit.
    """

    plain: Tensor
    codes: Tensor
    scales: Tensor
    bits: int

    @property
    def shape(self) -> torch.Size:
        """That of the plain rows: (plain slots, kv_heads, dim)."""
        return self.plain.shape

    def write(self, rows: Tensor, slots: Tensor) -> None:
        """Store rows (tokens, kv_heads, dim); a slot below zero is slot -1 - slot, quantised."""
        late = slots < 0
        if not bool(late.all()):
            self.plain.index_copy_(0, slots[~late], rows[~late])
        if bool(late.any()):
            codes, scales = quantise(rows[late], self.bits, self.scales.shape[2])
            places = -1 - slots[late]
            self.codes.index_copy_(0, places, codes)
            self.scales.index_copy_(0, places, scales)

    def read(self, early: slice | Tensor, late: slice | Tensor) -> Tensor:
        """Plain rows, then quantised rows, (tokens, kv_heads, dim)."""
        rows = dequantise(self.codes[late], self.scales[late], self.bits)
        plain = self.plain[early]
        return torch.cat((plain, rows)) if plain.shape[0] else rows


CacheRows: TypeAlias = Tensor | PackedRows


def quantise(rows: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """Affine codes and scales of rows (tokens, heads, dim), by group along dim.

    A group's smallest value is its bias; its scale is what the range needs, rounded to the rows'
    type. Codes are rounded after the scale was. At 4 bits a byte holds codes i and i + size / 2 of
    its group. Returns (tokens, heads, dim * bits / 8) and (tokens, heads, groups, 2).
    """
    grouped = rows.float().unflatten(-1, (groups, -1))
    low = grouped.amin(-1)
    levels = 2**bits - 1
    scale = ((grouped.amax(-1) - low) / levels).to(rows.dtype)
    divisor = torch.where(scale > 0, scale, 1).float()
    codes = ((grouped - low[..., None]) / divisor[..., None]).round().clamp(0, levels)
    codes = codes.to(torch.uint8)
    if bits == 4:
        first, second = codes.chunk(2, dim=-1)
        codes = first | second << 4
    return codes.flatten(-2), torch.stack((scale, low.to(rows.dtype)), dim=-1)


def dequantise(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Rows (tokens, heads, dim), in the scales' type, from what `quantise` returns."""
    grouped = codes.unflatten(-1, (scales.shape[-2], -1))
    if bits == 4:
        grouped = torch.cat((grouped & 15, grouped >> 4), dim=-1)
    wide = scales.float()
    rows = grouped.float() * wide[..., :1] + wide[..., 1:]
    return rows.flatten(-2).to(scales.dtype)
