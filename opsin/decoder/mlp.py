"""Feed-forward blocks of the decoder."""

from __future__ import annotations

from torch import Tensor, nn

from opsin.decoder.config import MLPConfig
from opsin.kernels import Kernels
from opsin.nn.linear import Linear


class GatedMLP(nn.Module):
    """down(activation(gate x) * up x), gate and up in one product (arXiv:2002.05202)."""

    def __init__(self, kernels: Kernels, config: MLPConfig, hidden: int) -> None:
        super().__init__()
        self.kernels = kernels
        self.activation = config.activation
        self.gate_up = Linear(kernels, hidden, (config.hidden, config.hidden), bias=config.bias)
        self.down = Linear(kernels, config.hidden, hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        return self.down(self.kernels.gated(self.gate_up(x), self.activation))
