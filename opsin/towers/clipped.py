"""Linear layers whose input and output are kept within learned bounds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsin.kernels import Kernels
from opsin.nn.linear import Linear


class ClippedLinear(nn.Module):
    """A linear layer between two clamps, or, without `clipped`, on its own."""

    def __init__(
        self, kernels: Kernels, in_features: int, out_features: int, *, clipped: bool
    ) -> None:
        super().__init__()
        self.clipped = clipped
        self.linear = Linear(kernels, in_features, out_features)
        if clipped:
            for name in ("input_min", "input_max", "output_min", "output_max"):
                bound = nn.Parameter(torch.empty(()), requires_grad=False)
                self.register_parameter(name, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        if not self.clipped:
            return self.linear(x)
        bound = self.get_parameter
        x = self.linear(x.clamp(bound("input_min"), bound("input_max")))
        return x.clamp(bound("output_min"), bound("output_max"))
