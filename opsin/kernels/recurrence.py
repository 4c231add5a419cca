"""Recurrent layers' arithmetic in plain torch: a causal convolution and the gated delta rule."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64


def causal_conv(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel convolved with its own kernel over its past.

    x (runs, tokens, channels) of runs of one length; weight (channels, kernel); state (runs, kernel
    - 1, channels), the inputs before. Returns the same shape as x, and the next state.
    """
    kernel = weight.shape[1]
    seen = torch.cat((state.to(x.dtype), x), dim=1)
    taps = seen.unfold(1, kernel, 1)  # (runs, tokens, channels, kernel)
    return (taps * weight).sum(dim=-1), seen[:, seen.shape[1] - kernel + 1 :]


def unit(x: Tensor) -> Tensor:
    """Vectors of length one along the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)


def delta_step(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, write: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of many sequences: forget, correct what the key recalls, read with the query.

    query and key (runs, heads, key_dim); value (runs, heads, value_dim); decay (log) and write
    (runs, heads); memory (runs, heads, key_dim, value_dim). Returns (runs, heads, value_dim) and
    the next memory. Equations 10 and 11 of arXiv:2412.06464.
    """
    memory = memory * decay.exp()[..., None, None]
    recalled = (key[:, :, None] @ memory).squeeze(2)
    correction = (value - recalled) * write[..., None]
    memory = memory + key[..., None] * correction[:, :, None]
    return (query[:, :, None] @ memory).squeeze(2), memory


def delta_chunk(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, write: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Up to CHUNK tokens of one sequence at once, by the WY form of section 3.3 of that paper.

    query and key (heads, tokens, key_dim); value (heads, tokens, value_dim); decay and write
    (heads, tokens); memory (heads, key_dim, value_dim). Returns (heads, tokens, value_dim) and the
    next memory.
    """
    total = decay.cumsum(dim=1)[..., None]  # (heads, tokens, 1)
    between = (total - total.mT).tril().exp().tril()  # decay from token j to token i
    written = key * write[..., None]
    system = (written @ key.mT) * between
    sides = torch.cat((value * write[..., None], written * total.exp()), dim=-1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    fresh, stale = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    fresh = fresh - stale @ memory
    out = (query * total.exp()) @ memory + ((query @ key.mT) * between) @ fresh
    last = total[:, -1:]
    memory = memory * last.exp() + (key * (last - total).exp()).mT @ fresh
    return out, memory
