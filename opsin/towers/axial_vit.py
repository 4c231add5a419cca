"""A vision transformer for pictures of any shape: places by row and column, norms around blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.kernels import Activation, Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm
from opsin.towers.clipped import ClippedLinear


@dataclass(frozen=True, slots=True)
class AxialConfig:
    """The tower's shape.

    `positions` is how many columns and rows have a learned place; `theta` is rope's. The tower's
    result is the mean of `pool` x `pool` patches, times the root of the width, and `standardised`
    by a learned mean and scale.
    """

    patch: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_hidden: int
    positions: int
    pool: int
    activation: Activation = "gelu_tanh"
    norm_eps: float = 1e-6
    theta: float = 100.0
    clipped: bool = False
    standardised: bool = False


class AxialAttention(nn.Module):
    """Attention with normalised queries, keys and values; half of each head turns by column."""

    def __init__(self, kernels: Kernels, config: AxialConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        hidden, clip = config.hidden, config.clipped
        wide, narrow = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = ClippedLinear(kernels, hidden, wide, clipped=clip)
        self.k = ClippedLinear(kernels, hidden, narrow, clipped=clip)
        self.v = ClippedLinear(kernels, hidden, narrow, clipped=clip)
        self.o = ClippedLinear(kernels, wide, hidden, clipped=clip)
        self.q_norm = norm(kernels, "rms", config.head_dim, config.norm_eps)
        self.k_norm = norm(kernels, "rms", config.head_dim, config.norm_eps)
        self.v_norm = norm(kernels, "rms_plain", config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, lengths: list[int], angles: Tensor) -> Tensor:
        """x (patches, hidden) to the same shape; angles (patches, 2, head_dim / 4)."""
        query, key, value = (
            part(x).unflatten(-1, (-1, self.config.head_dim)) for part in (self.q, self.k, self.v)
        )
        query = self._turned(self.q_norm(query), angles)
        key = self._turned(self.k_norm(key), angles)
        attended = self.kernels.dense_attention(query, key, self.v_norm(value), lengths, scale=1.0)
        return self.o(attended.flatten(1))

    def _turned(self, x: Tensor, angles: Tensor) -> Tensor:
        halves = zip(x.chunk(2, dim=-1), angles.unbind(1), strict=True)
        return torch.cat(
            [self.kernels.rope(part, at.cos(), at.sin(), "half") for part, at in halves], dim=-1
        )


class AxialMLP(nn.Module):
    """down(activation(gate x) * up x)."""

    def __init__(self, kernels: Kernels, config: AxialConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.activation = config.activation
        wide, clip = config.mlp_hidden, config.clipped
        self.gate = ClippedLinear(kernels, config.hidden, wide, clipped=clip)
        self.up = ClippedLinear(kernels, config.hidden, wide, clipped=clip)
        self.down = ClippedLinear(kernels, wide, config.hidden, clipped=clip)

    def forward(self, x: Tensor) -> Tensor:
        """x (patches, hidden) to the same shape."""
        return self.down(self.kernels.activation(self.gate(x), self.activation) * self.up(x))


class AxialLayer(nn.Module):
    """Attention and MLP, each normalised before and after, and added."""

    def __init__(self, kernels: Kernels, config: AxialConfig) -> None:
        super().__init__()
        shape = (config.hidden, config.norm_eps)
        self.attention_norm = norm(kernels, "rms", *shape)
        self.attention = AxialAttention(kernels, config)
        self.attention_post_norm = norm(kernels, "rms", *shape)
        self.mlp_norm = norm(kernels, "rms", *shape)
        self.mlp = AxialMLP(kernels, config)
        self.mlp_post_norm = norm(kernels, "rms", *shape)

    def forward(self, x: Tensor, lengths: list[int], angles: Tensor) -> Tensor:
        """x (patches, hidden) to the same shape."""
        attended = self.attention(self.attention_norm(x), lengths, angles)
        x = x + self.attention_post_norm(attended)
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class AxialTransformer(nn.Module):
    """Patches to pooled features, for any number of pictures at once."""

    def __init__(self, kernels: Kernels, config: AxialConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = Linear(kernels, 3 * config.patch**2, config.hidden)
        table = torch.empty(2, config.positions, config.hidden)
        self.positions = nn.Parameter(table, requires_grad=False)
        self.layers = nn.ModuleList(AxialLayer(kernels, config) for _ in range(config.layers))
        if config.standardised:
            self.mean = nn.Parameter(torch.empty(config.hidden), requires_grad=False)
            self.scale = nn.Parameter(torch.empty(config.hidden), requires_grad=False)

    def forward(self, patches: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """patches: each picture's (rows * columns, patch * patch * 3), from 0 to 1.

        sizes: each one's rows and columns. Returns each one's (rows * columns / pool^2, hidden).
        """
        weight = self.patch.weight
        places = torch.cat([_places(*size) for size in sizes]).to(weight.device)  # column, row
        x = self.patch((2 * (torch.cat(list(patches)).to(weight.device) - 0.5)).to(weight.dtype))
        x = x + self.positions[0, places[:, 0]] + self.positions[1, places[:, 1]]
        half = self.config.head_dim // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float, device=weight.device) / half
        angles = places[..., None].float() / self.config.theta**exponents
        lengths = [rows * columns for rows, columns in sizes]
        for layer in self.layers:
            x = layer(x, lengths, angles)
        parts = zip(x.split(lengths), sizes, strict=True)
        return [self.pooled(part, size) for part, size in parts]

    def pooled(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The means of squares of patches, in float32 until the end."""
        pool = self.config.pool
        rows, columns = size
        grid = x.float().view(rows // pool, pool, columns // pool, pool, -1)
        means = grid.mean(dim=(1, 3)).flatten(0, 1) * self.config.hidden**0.5
        if self.config.standardised:
            means = (means - self.mean.float()) * self.scale.float()
        return means.to(x.dtype)


def _places(rows: int, columns: int) -> Tensor:
    """Column and row of each patch of a grid, row by row: (rows * columns, 2)."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(1)
