"""Normalisation layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from opsin.kernels import Kernels


class RMSNorm(nn.Module):
    """Root-mean-square norm; `unit_offset` stores the weight minus one.

    The offset is folded in once by `finish_loading`, so `forward` is the same for both.
    """

    def __init__(
        self,
        kernels: Kernels,
        dim: int,
        eps: float,
        *,
        unit_offset: bool = False,
        weight: bool = True,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False) if weight else None

    def finish_loading(self) -> None:
        """Add the offset to the loaded weight; called once, when every weight is in place.

        The sum stays in float32: near one, bfloat16 would lose most of the stored weight's digits.
        """
        if self.unit_offset and self.weight is not None:
            self.weight.data = self.weight.data.float() + 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) to the same shape."""
        return self.kernels.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm, with or without a bias."""

    def __init__(self, kernels: Kernels, dim: int, eps: float, *, bias: bool = True) -> None:
        super().__init__()
        self.kernels = kernels
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) to the same shape."""
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)


NormKind = Literal["rms", "layer", "rms_unit_offset", "rms_plain"]


def norm(
    kernels: Kernels, kind: NormKind, dim: int, eps: float, *, bias: bool = True
) -> RMSNorm | LayerNorm:
    """A norm layer by kind; `bias` matters to "layer" only, "rms_plain" has no weight."""
    if kind == "layer":
        return LayerNorm(kernels, dim, eps, bias=bias)
    offset, weight = kind == "rms_unit_offset", kind != "rms_plain"
    return RMSNorm(kernels, dim, eps, unit_offset=offset, weight=weight)
