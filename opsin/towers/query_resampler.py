"""Learned queries that read a picture of any size by cross-attention (arXiv:2308.12966)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opsin.kernels import Kernels
from opsin.kernels.interface import attend
from opsin.nn.linear import Linear
from opsin.nn.norm import norm


class QueryResampler(nn.Module):
    """Every picture's features become as many vectors as there are queries.

    The features' places in their grid are told to the keys alone, as waves of row and column.
    """

    def __init__(
        self, kernels: Kernels, features: int, hidden: int, queries: int, heads: int
    ) -> None:
        super().__init__()
        self.hidden = hidden
        self.heads = heads
        self.queries = nn.Parameter(torch.empty(queries, hidden), requires_grad=False)
        self.inward: nn.Module = nn.Identity()
        if features != hidden:
            self.inward = Linear(kernels, features, hidden)
        self.query_norm = norm(kernels, "layer", hidden, 1e-6)
        self.feature_norm = norm(kernels, "layer", hidden, 1e-6)
        self.query = Linear(kernels, hidden, hidden, bias=True)
        self.key = Linear(kernels, hidden, hidden, bias=True)
        self.value = Linear(kernels, hidden, hidden, bias=True)
        self.out = Linear(kernels, hidden, hidden, bias=True)
        self.post_norm = norm(kernels, "layer", hidden, 1e-6)
        self.project = Linear(kernels, hidden, hidden)

    def forward(self, features: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """features (sum of rows * columns, width) to (pictures, queries, hidden)."""
        x = self.feature_norm(self.inward(features))
        places = torch.cat([place_waves(*grid, self.hidden) for grid in grids]).to(x)
        query, key, value = (
            part.unflatten(-1, (self.heads, -1))
            for part in (
                self.query(self.query_norm(self.queries)),
                self.key(x + places),
                self.value(x),
            )
        )
        counts = [rows * columns for rows, columns in grids]
        scale = (self.hidden // self.heads) ** -0.5
        read = [
            attend(query, keys, values, None, scale, None, None)
            for keys, values in zip(key.split(counts), value.split(counts), strict=True)
        ]
        return self.project(self.post_norm(self.out(torch.stack(read).flatten(-2))))


def place_waves(rows: int, columns: int, dim: int) -> Tensor:
    """Sines and cosines of each cell's column, then of its row: (rows * columns, dim), float32."""
    quarter = dim // 4
    speeds = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float32) / quarter)

    def waves(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float32)[:, None] * speeds
        return torch.cat((angles.sin(), angles.cos()), dim=-1)  # (count, dim / 2)

    across = waves(columns).expand(rows, -1, -1)
    down = waves(rows)[:, None].expand(-1, columns, -1)
    return torch.cat((across, down), dim=-1).flatten(0, 1)
