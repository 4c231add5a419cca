"""Softmax attention that keeps one small vector a token, of which every head makes its key and
value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from opsin.decoder.attention import StepContext
from opsin.decoder.config import AttentionConfig, LatentAttentionConfig
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import RMSNorm


class HeadMaps(nn.Module):
    """For each head, the maps from the kept vector to a key's plain part and to a value.

    One matrix (heads * (plain + value), latent), a head's rows after another's, as checkpoints
    have it.
    """

    def __init__(self, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.splits = config.plain_dim, config.value_dim
        rows = config.heads * sum(self.splits)
        self.weight = nn.Parameter(torch.empty(rows, config.latent), requires_grad=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The maps (heads, plain, latent) and (heads, value, latent)."""
        keys, values = self.weight.unflatten(0, (-1, sum(self.splits))).split(self.splits, dim=1)
        return keys, values


class LatentAttention(nn.Module):
    """See `LatentAttentionConfig`; adapters are not for it.

    A head's key is never made: its map is applied to the query instead, so that all heads attend to
    what the cache holds, and the values' map to what attention returns.
    """

    def __init__(
        self,
        kernels: Kernels,
        config: AttentionConfig,
        layer: int,
        hidden: int,
        eps: float,
        adapters: Sequence[tuple[int, float]] = (),
    ) -> None:
        super().__init__()
        assert isinstance(config, LatentAttentionConfig)
        assert config.rope is not None
        assert (config.kv_heads, config.head_dim) == (1, config.rope.dim + config.latent)
        assert not adapters
        del eps  # the norms within have their own
        self.kernels = kernels
        self.config = config
        self.rope = config.rope
        self.layer = layer
        wide = config.heads * (config.plain_dim + self.rope.dim)
        self.scale = config.scale or (config.plain_dim + self.rope.dim) ** -0.5
        rank, narrow = config.query_rank, config.rope.dim + config.latent
        self.query_norm = self.query_up = None
        self.query = Linear(
            kernels, hidden, rank or wide, bias=config.qkv_bias and rank is not None
        )
        if rank is not None:
            self.query_norm = RMSNorm(kernels, rank, config.latent_eps)
            self.query_up = Linear(kernels, rank, wide)
        self.latent = Linear(kernels, hidden, narrow, bias=config.qkv_bias)
        self.latent_norm = RMSNorm(kernels, config.latent, config.latent_eps)
        self.maps = HeadMaps(config)
        self.out = Linear(kernels, config.heads * config.value_dim, hidden, bias=config.out_bias)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape; the new vectors end up in the cache."""
        config, kernels, turning = self.config, self.kernels, self.rope.dim
        to_keys, to_values = self.maps()
        query = self._queries(x).unflatten(-1, (config.heads, -1))
        plain, turned = query.split((config.plain_dim, turning), dim=-1)
        absorbed = torch.bmm(plain.transpose(0, 1), to_keys).transpose(0, 1)
        latent, common = self.latent(x).split((config.latent, turning), dim=-1)
        row = torch.cat((common, self.latent_norm(latent.contiguous())), dim=-1)[:, None]
        query = torch.cat((turned, absorbed), dim=-1)  # (tokens, heads, turning + latent)
        cos, sin = context.angles[self.rope]
        query = kernels.rope(query, cos, sin, self.rope.pairs)
        row = kernels.rope(row, cos, sin, self.rope.pairs)
        rows = context.cache.keys[self.layer]  # the values are among them
        kernels.write_kv(row, row, rows, rows, context.batch.slot_mapping)
        attended = kernels.paged_attention(
            query, rows, rows, context.batch, scale=self.scale, window=config.window
        )
        attended = attended[..., turning:].transpose(0, 1)  # (heads, tokens, latent)
        values = torch.bmm(attended, to_values.transpose(1, 2)).transpose(0, 1)
        return self.out(values.flatten(1))

    def _queries(self, x: Tensor) -> Tensor:
        """All heads' queries of x (tokens, hidden), side by side."""
        if self.query_norm is None or self.query_up is None:
            return self.query(x)
        return self.query_up(self.query_norm(self.query(x)))
