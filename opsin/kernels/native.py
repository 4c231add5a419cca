"""Linear layers in bfloat16 on the native kernels, for processors whose own libraries are slow."""

from __future__ import annotations

import torch
from torch import Tensor

from opsin.kernels.cpu.library import Library
from opsin.kernels.cpu.matrix import PackedMatrix
from opsin.kernels.interface import Activation, Kernels

LEAST_WEIGHTS = 1 << 14  # a smaller product takes less than what leads to it


class NativeKernels(Kernels):
    """Torch, but for products in bfloat16: it makes those many times slower than in float32 on a
    processor without instructions for them.
    """

    name = "native"

    def __init__(self, library: Library) -> None:
        self.library = library

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None = None,
    ) -> Tensor:
        """As the plain one, rounded once, at the end; the weight is read where it lies.

        A row's result is the same bits whatever rows are beside it.
        """
        small = weight.numel() < LEAST_WEIGHTS or x.ndim < 2
        if small or x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
            return super().linear(x, weight, bias, activation)
        matrix = PackedMatrix(self.library, "bf16", *weight.shape)
        weight = weight.contiguous()
        if not matrix.map(weight):
            matrix.fill(weight)
        if bias is not None:
            matrix.fill_bias(bias)
        rows = matrix.multiply(x.flatten(0, -2), activation=activation)
        return rows.unflatten(0, x.shape[:-1])
