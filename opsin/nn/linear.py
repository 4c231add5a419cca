"""Linear layers, dense or packed, with several projections of one input stored as one matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from opsin.checkpoint.safetensors import MappedRange
from opsin.kernels import Activation, Kernels
from opsin.kernels.packed import Packed
from opsin.nn.late import LateMatrix


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
        self.packed: Packed | None = None
        self.mapped: MappedRange | None = None  # where the weight lies in a file, if it does

    def release(self) -> None:
        """Hold no memory for a weight that lies in a file until its next use."""
        if self.mapped is not None:
            self.mapped.release()
        if isinstance(self.packed, LateMatrix):
            self.packed.release()

    def pack(self, packed: Packed, nothing: Tensor) -> None:
        """Let `packed` take the weight's place; `nothing` is empty, of the model's dtype."""
        self.packed = packed
        self.weight = nn.Parameter(nothing, requires_grad=False)

    def pack_bias(self, *, spread: int = 1) -> None:
        """Hand the bias to the packed matrix too; with spread 2 its halves alternate by sixteen."""
        if self.packed is None or self.bias is None or not self.bias.numel():
            return
        for i, part in enumerate(self.bias.data.chunk(spread)):
            self.packed.fill_bias(part, 16 * i, spread=spread)
        self.bias.data = self.bias.data.new_empty(0)

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """The rows of parameter `name` that output number index[0] owns, as a view to fill."""
        start = sum(self.splits[: index[0]])
        return self.get_parameter(name).data[start : start + self.splits[index[0]]]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        if self.packed is None:
            return self.kernels.linear(x, self.weight, self.bias)
        return self.packed.multiply(x.flatten(0, -2)).unflatten(0, x.shape[:-1])

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(y), without a pass of its own where the product can do it: (..., out)."""
        if self.packed is None:
            return self.kernels.linear(x, self.weight, self.bias, activation)
        rows = self.packed.multiply(x.flatten(0, -2), activation=activation)
        return rows.unflatten(0, x.shape[:-1])


class Adapter(nn.Module):
    """A low-rank correction of a linear layer (arXiv:2106.09685): scale * up(down(x))."""

    def __init__(
        self, kernels: Kernels, in_features: int, out_features: int, rank: int, scale: float
    ) -> None:
        super().__init__()
        self.down = Linear(kernels, in_features, rank)
        self.up = Linear(kernels, rank, out_features)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, in) to (tokens, out)."""
        return self.up(self.down(x)) * self.scale


class AdaptedLinear(Linear):
    """A linear layer with adapters, of which each token uses one or none.

    `adapters` gives each one's rank and scale. Tokens that use the same one share its products, so
    that requests with different adapters go through together.
    """

    def __init__(
        self,
        kernels: Kernels,
        in_features: int,
        out_features: int | tuple[int, ...],
        *,
        bias: bool = False,
        adapters: Sequence[tuple[int, float]] = (),
    ) -> None:
        super().__init__(kernels, in_features, out_features, bias=bias)
        width = sum(self.splits)
        self.adapters = nn.ModuleList(
            Adapter(kernels, in_features, width, rank, scale) for rank, scale in adapters
        )

    def forward(self, x: Tensor, rows: Mapping[int, Tensor] | None = None) -> Tensor:
        """x (tokens, in) to (tokens, out); rows[i] are the tokens that use adapter i."""
        out = super().forward(x)
        for index, chosen in (rows or {}).items():
            if len(chosen) == len(x):
                return out + self.adapters[index](x)
            out.index_add_(0, chosen, self.adapters[index](x[chosen]))
        return out


def adapted_linear(
    kernels: Kernels,
    in_features: int,
    out_features: int | tuple[int, ...],
    adapters: Sequence[tuple[int, float]],
    *,
    bias: bool = False,
) -> Linear:
    """A plain linear layer, or one with adapters where there are any."""
    if not adapters:
        return Linear(kernels, in_features, out_features, bias=bias)
    return AdaptedLinear(kernels, in_features, out_features, bias=bias, adapters=adapters)


class Embedding(nn.Module):
    """A table of rows, looked up by token id; `scale` multiplies what is looked up.

    `rows` may name several runs of rows, which a checkpoint stores apart, as in `Linear`.
    """

    def __init__(self, rows: int | tuple[int, ...], dim: int, scale: float = 1.0) -> None:
        super().__init__()
        self.splits = (rows,) if isinstance(rows, int) else rows
        self.weight = nn.Parameter(torch.empty(sum(self.splits), dim), requires_grad=False)
        self.scale = scale
        self.packed: Packed | None = None

    def pack(self, packed: Packed, nothing: Tensor) -> None:
        """Let `packed` take the table's place; `nothing` is empty, of the model's dtype."""
        self.packed = packed
        self.weight = nn.Parameter(nothing, requires_grad=False)

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """The rows of run number index[0], as a view to fill."""
        start = sum(self.splits[: index[0]])
        return self.get_parameter(name).data[start : start + self.splits[index[0]]]

    def as_head(self, x: Tensor, kernels: Kernels) -> Tensor:
        """x (rows, dim) times every row of the table: (rows, rows of the table)."""
        if self.packed is None:
            return kernels.linear(x, self.weight, None)
        return self.packed.multiply(x)

    def finish_loading(self) -> None:
        """Round the scale to the weights' precision, as models that have one were trained."""
        self.scale = float(torch.tensor(self.scale, dtype=self.weight.dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (tokens,) to (tokens, dim)."""
        if self.packed is None:
            rows = self.weight[ids]
        else:
            rows = self.packed.rows(ids, self.weight.dtype)
        return rows if self.scale == 1.0 else rows * self.scale
