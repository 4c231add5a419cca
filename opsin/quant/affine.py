"""Affine groups: weights as codes of a few bits with a scale and a bias for each group."""

from __future__ import annotations

import torch
from torch import Tensor

from opsin.quant.formats import Format


def unpack_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """Little-endian bit fields of 32-bit words (rows, words) as codes (rows, columns), uint8."""
    wide = words.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    start = torch.arange(columns, device=words.device) * bits
    word, shift = start // 32, start % 32
    low = wide[:, word] >> shift
    following = wide[:, (word + 1).clamp_max(wide.shape[1] - 1)]
    high = torch.where(shift + bits > 32, following << (32 - shift), 0)
    return ((low | high) & (2**bits - 1)).to(torch.uint8)


def dequantise(codes: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
    """codes (n, k) with scales and biases (n, groups): the weight (n, k), float32."""
    grouped = codes.float().unflatten(1, (scales.shape[1], -1))
    return (grouped * scales.float()[..., None] + biases.float()[..., None]).flatten(1)


def quantise(weight: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    """weight (n, k) as codes (n, k), scales and biases (n, k / group) of a format."""
    grouped = weight.float().unflatten(1, (-1, form.group or weight.shape[1]))
    top = 255.0 if form.kind == "q8" else 15.0
    low, high = grouped.amin(dim=2).clamp_max(0.0), grouped.amax(dim=2).clamp_min(0.0)
    if form.kind == "q8":
        scales = (grouped.abs().amax(dim=2) / 127.0).to(form.scale_dtype)
        biases = (-128.0 * scales.float()).to(form.scale_dtype)
    else:
        scales, biases = ((high - low) / 15.0).to(form.scale_dtype), low.to(form.scale_dtype)
    step = scales.float()[..., None]
    codes = (grouped - biases.float()[..., None]) / torch.where(step > 0.0, step, torch.inf)
    return codes.round().clamp(0.0, top).to(torch.uint8).flatten(1), scales, biases
