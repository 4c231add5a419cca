"""Dense linear layers, with several projections of one input stored as one matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsin.kernels import Kernels


class Linear(nn.Module):
    """y = x W^T + b, where `out_features` may name several outputs that share the product.

    A checkpoint that stores them apart fills the row ranges `splits` one by one (see
    `opsin.checkpoint.weights`); `forward` returns them side by side, (..., sum(out_features)).
    """

    def __init__(
        self,
        kernels: Kernels,
        in_features: int,
        out_features: int | tuple[int, ...],
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.splits = (out_features,) if isinstance(out_features, int) else out_features
        self.weight = nn.Parameter(torch.empty(sum(self.splits), in_features), requires_grad=False)
        self.bias = (
            nn.Parameter(torch.empty(sum(self.splits)), requires_grad=False) if bias else None
        )

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """The rows of parameter `name` that output number index[0] owns, as a view to fill."""
        start = sum(self.splits[: index[0]])
        return self.get_parameter(name).data[start : start + self.splits[index[0]]]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return self.kernels.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A table of rows, looked up by token id; `scale` multiplies what is looked up."""

    def __init__(self, rows: int, dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim), requires_grad=False)
        self.scale = scale

    def finish_loading(self) -> None:
        """Round the scale to the weights' precision, as models that have one were trained."""
        self.scale = float(torch.tensor(self.scale, dtype=self.weight.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (tokens,) to (tokens, dim)."""
        rows = self.weight[ids]
        return rows if self.scale == 1.0 else rows * self.scale
