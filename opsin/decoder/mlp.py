"""Feed-forward blocks of the decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.decoder.config import MLPConfig, PlainMLPConfig, SparseMLPConfig
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
        return self.down(self.up.activated(x, self.activation))


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


class SparseMLP(GatedMLP):
    """See `SparseMLPConfig`; adapters are not for it."""

    def __init__(self, kernels: Kernels, config: MLPConfig, hidden: int) -> None:
        assert isinstance(config, SparseMLPConfig)
        super().__init__(kernels, config, hidden)
        self.deviations = NormalDist().inv_cdf(config.sparsity)

    def forward(self, x: Tensor, adapters: Mapping[int, Tensor] | None = None) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        del adapters
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        deviation, mean = torch.std_mean(gate, dim=-1, keepdim=True, correction=0)
        passed = F.relu(gate - (mean + deviation * self.deviations))
        return self.down(self.kernels.activation(passed, self.activation) * up)
