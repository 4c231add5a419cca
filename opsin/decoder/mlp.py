"""Feed-forward blocks of the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from opsin.decoder.config import MLPConfig, PlainMLPConfig
from opsin.kernels import Kernels
from opsin.nn.linear import Linear, adapted_linear


class PlainMLP(nn.Module):
    """down(activation(up x)), both with biases."""

    def __init__(self, kernels: Kernels, config: PlainMLPConfig, hidden: int) -> None:
        super().__init__()
        self.kernels = kernels
        self.activation = config.activation
        self.up = Linear(kernels, hidden, config.hidden, bias=True)
        self.down = Linear(kernels, config.hidden, hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) to the same shape."""
        return self.down(self.kernels.activation(self.up(x), self.activation))


class GatedMLP(nn.Module):
    """down(activation(gate x) * up x), gate and up in one product (arXiv:2002.05202)."""

    def __init__(
        self,
        kernels: Kernels,
        config: MLPConfig,
        hidden: int,
        adapters: Sequence[tuple[int, float]] = (),
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.activation = config.activation
        self.adapted = bool(adapters)
        widths = (config.hidden, config.hidden)
        self.gate_up = adapted_linear(kernels, hidden, widths, adapters, bias=config.bias)
        self.down = adapted_linear(kernels, config.hidden, hidden, adapters, bias=config.bias)

    def forward(self, x: Tensor, adapters: Mapping[int, Tensor] | None = None) -> Tensor:
        """x (tokens, hidden) to the same shape; adapters[i] are the tokens that use adapter i."""
        if self.adapted:
            gated = self.kernels.gated(self.gate_up(x, adapters), self.activation)
            return self.down(gated, adapters)
        return self.down(self.kernels.gated(self.gate_up(x), self.activation))
