"""From a tower's features to the decoder's embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsin.kernels import Activation, Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import NormKind, norm


class MLPProjector(nn.Module):
    """Linear, activation, linear; optionally behind a norm over `norm_dim` features.

    Merging patches is a reshape: with a norm over fewer features than `in_features`, each patch is
    normalised alone and then merged.
    """

    def __init__(
        self,
        kernels: Kernels,
        in_features: int,
        hidden: int,
        out_features: int,
        *,
        activation: Activation = "gelu",
        bias: bool = True,
        norm_kind: NormKind | None = None,
        norm_dim: int = 0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.activation: Activation = activation
        self.in_features = in_features
        self.norm_dim = norm_dim or in_features
        self.norm: nn.Module = nn.Identity()
        if norm_kind is not None:
            self.norm = norm(kernels, norm_kind, self.norm_dim, norm_eps)
        self.up = Linear(kernels, in_features, hidden, bias=bias)
        self.down = Linear(kernels, hidden, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (patches, dim) to (patches * dim / in_features, out_features)."""
        merged = self.norm(x.reshape(-1, self.norm_dim)).view(-1, self.in_features)
        return self.down(self.up.activated(merged, self.activation))


class DeepProjector(nn.Module):
    """Any number of linear layers with activations between."""

    def __init__(
        self, kernels: Kernels, in_features: int, out_features: int, depth: int, kind: Activation
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.activation: Activation = kind
        self.layers = nn.ModuleList(
            Linear(kernels, out_features if i else in_features, out_features, bias=True)
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) to (..., out_features)."""
        for i, layer in enumerate(self.layers):
            x = layer(self.kernels.activation(x, self.activation) if i else x)
        return x


class PairedProjector(nn.Module):
    """Two towers' features of one patch, each to half the width, then mixed."""

    def __init__(self, kernels: Kernels, widths: tuple[int, int], out_features: int) -> None:
        super().__init__()
        self.kernels = kernels
        self.first = Linear(kernels, widths[0], out_features // 2, bias=True)
        self.second = Linear(kernels, widths[1], out_features // 2, bias=True)
        self.out = Linear(kernels, out_features, out_features, bias=True)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Features (..., widths[0]) and (..., widths[1]) to (..., out_features)."""
        both = torch.cat((self.first(first), self.second(second)), dim=-1)
        return self.out(self.kernels.activation(both, "gelu"))


class GatedProjector(nn.Module):
    """down(activation(gate x) * up x), to another width."""

    def __init__(
        self,
        kernels: Kernels,
        in_features: int,
        hidden: int,
        out_features: int,
        activation: Activation = "silu",
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.activation: Activation = activation
        self.gate_up = Linear(kernels, in_features, (hidden, hidden))
        self.down = Linear(kernels, hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x (patches, in_features) to (patches, out_features)."""
        return self.down(self.kernels.gated(self.gate_up(x), self.activation))


class LearnedVector(nn.Module):
    """One learned embedding, such as the one that ends a row of patches."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Put it after the last column of rows (height, width, dim)."""
        return torch.cat((rows, self.weight.expand(len(rows), 1, -1)), dim=1)
