"""Plain torch twins of the native quantised products: the same numbers, rounded the same way."""

from __future__ import annotations

import torch
from torch import Tensor


def quantise_rows(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x (rows, k) as int8 codes (rows, groups, group) and float32 scales (rows, groups).

    Symmetric, 127 for the largest of a group; a group below 1e-30 counts as zero, and one that is
    not finite has a scale of NaN.
    """
    grouped = x.float().unflatten(1, (-1, group))
    most = grouped.abs().amax(dim=2)
    finite = most.isfinite()
    used = finite & (most >= 1e-30)
    inverse = torch.where(used, 127.0 / most, 0.0)
    codes = torch.where(used[..., None], grouped * inverse[..., None], 0.0).round()
    scale = torch.where(used, most / 127.0, torch.where(finite, 0.0, torch.nan))
    return codes.to(torch.int8), scale


def affine_linear(
    x: Tensor, codes: Tensor, scales: Tensor, biases: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x (rows, k) times the dequantised weight (n, k) transposed, x in int8 per group.

    Sums within a group are exact; groups add up in order, in float32. Returns (rows, n).
    """
    groups = scales.shape[1]
    group = codes.shape[1] // groups
    quantised, row_scale = quantise_rows(x, group)
    row_sum = row_scale * quantised.sum(dim=2).float()
    weights = codes.to(torch.float64).unflatten(1, (groups, group))
    out = torch.zeros(x.shape[0], codes.shape[0])
    for g in range(groups):
        exact = quantised[:, g].to(torch.float64) @ weights[:, g].T  # whole numbers below 2^53
        out += exact.float() * (scales[:, g].float() * row_scale[:, g, None])
        out += biases[:, g].float() * row_sum[:, g, None]
    return out if bias is None else out + bias.float()
