"""Affine groups: weights as codes of a few bits with a scale and a bias for each group."""

from __future__ import annotations

import torch
from torch import Tensor

from opsin.quant.formats import WIDTHS, Format
from opsin.quant.rotation import rotate

MANY = 31.0  # codes of 5 bits and more lose nothing by one start


def unpack_codes(words: Tensor, bits: int, columns: int) -> Tensor:
    """Little-endian bit fields of 32-bit words (rows, words) as codes (rows, columns), uint8."""
    wide = words.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    start = torch.arange(columns, device=words.device) * bits
    word, shift = start // 32, start % 32
    low = wide[:, word] >> shift
    following = wide[:, (word + 1).clamp_max(wide.shape[1] - 1)]
    high = torch.where(shift + bits > 32, following << (32 - shift), 0)
    return ((low | high) & (2**bits - 1)).to(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, columns), uint8, as little-endian bit fields of 32-bit words (rows, words).

    The columns are whole words: a multiple of 32 always is. The inverse of `unpack_codes`.
    """
    fields = codes.to(torch.int64).unflatten(1, (-1, 32))  # 32 codes fill `bits` words
    words = torch.zeros(*fields.shape[:2], bits + 1, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        placed = fields[..., i] << shift
        words[..., word] |= placed & 0xFFFFFFFF
        words[..., word + 1] |= placed >> 32
    return words[..., :bits].flatten(1).to(torch.uint32)


def dequantise(codes: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
    """codes (n, k) with scales and biases (n, groups): the weight (n, k), float32."""
    grouped = codes.float().unflatten(1, (scales.shape[1], -1))
    return (grouped * scales.float()[..., None] + biases.float()[..., None]).flatten(1)


def quantise(weight: Tensor, form: Format) -> tuple[Tensor, Tensor, Tensor]:
    """weight (n, k) as codes (n, k), scales and biases (n, k / group) of a format.

    A rotated format's are those of the rotated weight. What a format keeps in bytes is float32, of
    the values that bytes can say.
    8 bits are symmetric. At fewer, scale and bias are those of the smallest squared error that
    least squares finds, as the native kernels find them.
    """
    values = rotate(weight) if form.rotated else weight.float()
    grouped = values.unflatten(1, (-1, form.group or weight.shape[1]))
    if form.kind == "q8":
        scales = (grouped.abs().amax(dim=2) / 127.0).to(form.scale_dtype)
        biases = (-128.0 * scales.float()).to(form.scale_dtype)
        return _codes(grouped, scales, biases, 255.0).to(torch.uint8).flatten(1), scales, biases
    top = 2.0 ** WIDTHS[form.kind] - 1
    scale, bias = fitted(grouped, top)
    if form.scale_dtype == torch.uint8:
        scales, biases = _in_bytes(scale, bias, top)
    else:
        scales, biases = scale.to(form.scale_dtype), bias.to(form.scale_dtype)
    return _codes(grouped, scales, biases, top).to(torch.uint8).flatten(1), scales, biases


def _in_bytes(scale: Tensor, bias: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """Scales and biases (n, groups) as bytes can say them.

    Where a scale changes by that, the middle of what its codes can say stays where it was.
    """
    unit, step = scale.amax(dim=1, keepdim=True) / 255.0, (top + 1.0) / 256.0
    kept = torch.where(unit > 0.0, scale / unit, 0.0).round().clamp_min(1.0) * unit
    shifted = bias + (scale - kept) * (top / 2.0)
    zero = (-shifted / torch.where(kept > 0.0, step * kept, torch.inf)).round().clamp(0.0, 255.0)
    return kept, -zero * step * kept


def fitted(grouped: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """The scale and bias (n, groups) of each group of grouped (n, groups, columns).

    For codes from 0 to top: those of the smallest squared error that least squares finds from
    several starts, from one where codes are many. Zero stays within what codes can say.
    """
    low, high = grouped.amin(dim=2).clamp_max(0.0), grouped.amax(dim=2).clamp_min(0.0)
    best = torch.full_like(low, torch.inf)
    scale, bias = (high - low) / top, low
    mean = grouped.mean(dim=2, keepdim=True)
    apart = grouped - mean
    for part in (1.0, 0.9, 0.8) if top < MANY else (1.0,):
        s, b = (high - low) / top * part, low * part
        for _ in range(3):
            codes = _codes(grouped, s, b, top)
            middle = codes.mean(dim=2, keepdim=True)
            steps = codes - middle
            spread = steps.square().sum(dim=2)
            fit = (steps * apart).sum(dim=2) / spread.clamp_min(1e-30)
            s = torch.where(spread > 0.0, fit, s)
            b = mean[..., 0] - s * middle[..., 0]
            error = (grouped - codes * s[..., None] - b[..., None]).square().sum(dim=2)
            better = (error <= best) & (b <= 0.0) & (b >= -top * s)
            scale, bias = torch.where(better, s, scale), torch.where(better, b, bias)
            best = torch.where(better, error, best)
    return scale, bias


def _codes(grouped: Tensor, scales: Tensor, biases: Tensor, top: float) -> Tensor:
    """grouped (n, groups, columns) as whole numbers from 0 to top, still floats."""
    step = scales.float()[..., None]
    codes = (grouped - biases.float()[..., None]) / torch.where(step > 0.0, step, torch.inf)
    return codes.round().clamp(0.0, top)


def encode(
    weight: Tensor, bits: int, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """weight (n, k) as words of codes (n, k * bits / 32), scales and biases (n, k / group).

    The codes are those of the scales and biases as `dtype` rounds them.
    """
    grouped, top = weight.float().unflatten(1, (-1, group)), 2.0**bits - 1
    scale, bias = fitted(grouped, top)
    scales, biases = scale.to(dtype), bias.to(dtype)
    codes = _codes(grouped, scales, biases, top).to(torch.uint8).flatten(1)
    return pack_codes(codes, bits), scales, biases
