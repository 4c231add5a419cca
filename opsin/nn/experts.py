"""The same linear map for many experts, stored as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opsin.kernels import Kernels
from opsin.kernels.packed import Packed, packed_experts


class ExpertLinear(nn.Module):
    """y = x W_e^T for the expert e of each row; weight is (experts, out, in).

    `out_features` may name several outputs that share the product, as in `Linear`.
    """

    def __init__(
        self, kernels: Kernels, experts: int, in_features: int, out_features: int | tuple[int, ...]
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.splits = (out_features,) if isinstance(out_features, int) else out_features
        shape = (experts, sum(self.splits), in_features)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.packed: Sequence[Packed] = ()  # one an expert, where they are packed

    def pack(self, packed: Sequence[Packed], nothing: Tensor) -> None:
        """Let `packed` take the weight's place; `nothing` is empty, of the model's dtype."""
        self.packed = packed
        self.weight = nn.Parameter(nothing, requires_grad=False)

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """The rows of output index[0], of every expert or of expert index[1] alone, to fill."""
        start = sum(self.splits[: index[0]])
        rows = self.get_parameter(name).data[:, start : start + self.splits[index[0]]]
        return rows[index[1]] if len(index) > 1 else rows

    def forward(self, x: Tensor, expert_ids: Tensor) -> Tensor:
        """x (rows, in), sorted by expert; expert_ids (rows,). Returns (rows, out)."""
        if self.packed:
            return packed_experts(x, self.packed, expert_ids)
        return self.kernels.expert_linear(x, self.weight, expert_ids)
