"""A few neighbouring patches to one: their mean attends to them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from opsin.kernels import Kernels
from opsin.nn.linear import Linear


class WindowPooling(nn.Module):
    """Attention in windows of patches, with the mean of those that are there for a query."""

    def __init__(
        self, kernels: Kernels, features: int, hidden: int, heads: int, *, out: bool
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query = Linear(kernels, features, hidden, bias=True)
        self.key_value = Linear(kernels, features, (hidden, hidden), bias=True)
        self.out: nn.Module = nn.Identity()
        if out:
            self.out = Linear(kernels, hidden, hidden, bias=True)

    def forward(self, x: Tensor, there: Tensor | None = None, *, hide: bool = False) -> Tensor:
        """x (windows, patches, features) to (windows, hidden).

        there (windows, patches) is False where a window has fewer patches, whose features are zero;
        with `hide` they are not attended to either.
        """
        if there is None:
            query = x.mean(1, keepdim=True)
        else:
            query = x.sum(1, keepdim=True) / there.sum(1)[:, None, None].to(x.dtype)
        parts = [self.query(query), *self.key_value(x).chunk(2, dim=-1)]
        asked, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts
        )
        mask = there[:, None, None] if there is not None and hide else None
        pooled = F.scaled_dot_product_attention(asked, keys, values, attn_mask=mask)
        result: Tensor = self.out(pooled.transpose(1, 2).flatten(1))
        return result
