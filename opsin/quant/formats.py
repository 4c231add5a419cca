"""How a weight matrix is kept in memory, and which layers are kept how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from opsin.errors import InputError

Kind = Literal["bf16", "bf13", "q8", "q6", "q5", "q4"]
WIDTHS: dict[Kind, int] = {"bf16": 16, "bf13": 13, "q8": 8, "q6": 6, "q5": 5, "q4": 4}
BITS = (4, 8)
GROUPS = (128, 64, 32)
# Columns of a group. More bits are for what is sensitive, or were asked for; with 4, an eighth of a
# bit more for scales buys less than elsewhere (docs/quantisation.md).
GROUP: dict[Kind, int] = {"q8": 64, "q5": 64, "q4": 128}
MOST_COLUMNS = 65536  # of a row with one scale: its sums fit in 32 bits


@dataclass(frozen=True, slots=True)
class Format:
    """A matrix as bfloat16, as it is or without loss in thirteen bits, or as affine codes with a
    scale and bias per `group` columns.

    Scales and biases are of a 16-bit `scale_dtype`; or torch.uint8, a byte each: the scale in
    255ths of the row's largest, and a zero point z in 256ths of the codes' range, bias = -z scale.

    Group 0 is one scale and bias a row. Rotated: columns are mixed (`quant/rotation.py`) before
    they are rounded, and activations with them.
    """

    kind: Kind
    group: int = 0
    scale_dtype: torch.dtype = torch.float16
    rotated: bool = False

    @property
    def is_bfloat16(self) -> bool:
        """Whether its values are bfloat16 rather than codes."""
        return self.kind in ("bf16", "bf13")

    @property
    def bits(self) -> float:
        """Bits of memory that a weight takes, its share of scale and bias included."""
        own = (16 if self.scale_dtype == torch.uint8 else 32) / self.group if self.group else 0.0
        return WIDTHS[self.kind] + own


def quantised(kind: Kind, columns: int, most: int | None = None) -> Format:
    """The format of a matrix of so many columns, in the largest groups that they are whole ones of,
    `most` columns at most.

    Where they are not, it is 8 bits by rows.
    """
    most = most or GROUP[kind]
    group = next((group for group in GROUPS if group <= most and columns % group == 0), 0)
    kind = kind if group else "q8"
    scales = torch.float16 if kind == "q8" else torch.uint8
    return Format(kind, group, scales, rotated=group > 0)


def quantised_by_rows(columns: int) -> Format:
    """8 bits with one scale a row, as far as the whole numbers of such a row can be added."""
    return Format("q8", 0) if columns <= MOST_COLUMNS else quantised("q8", columns)


def check_bits(bits: int | None) -> None:
    """Raise InputError for a number of bits that nothing can be quantised to."""
    if bits is not None and bits not in BITS:
        raise InputError(
            f"Cannot quantise to {bits} bits",
            remedy=f"Use {' or '.join(map(str, BITS))}, or leave it out",
            param="quant",
        )
