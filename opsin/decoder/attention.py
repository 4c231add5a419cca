"""Grouped-query softmax attention over the paged cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.decoder.cache import PagedCache
from opsin.decoder.config import AttentionConfig
from opsin.decoder.source import SourceStep
from opsin.kernels import AttentionBatch, Kernels
from opsin.nn.linear import adapted_linear
from opsin.nn.norm import LayerNorm, RMSNorm, norm
from opsin.nn.rope import RopeConfig


@dataclass(frozen=True, slots=True)
class StepContext:
    """What every layer of one step shares: cache, places in it, positions and rotary angles."""

    cache: PagedCache
    batch: AttentionBatch
    positions: Tensor
    angles: dict[RopeConfig, tuple[Tensor, Tensor]]
    source: SourceStep | None = None
    expert_groups: Tensor | None = None
    adapters: Mapping[int, Tensor] | None = None
    layer_inputs: Tensor | None = None


class WholeRMSNorm(RMSNorm):
    """Root-mean-square norm over the queries, or keys, of all heads of a token."""

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, heads, dim) to the same shape."""
        return super().forward(x.flatten(1)).view(x.shape)


class Attention(nn.Module):
    """Query, key and value in one product; rope; cache write; attention; output projection."""

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
        self.kernels = kernels
        self.config = config
        self.layer = layer
        self.scale = config.head_dim**-0.5 if config.scale is None else config.scale
        q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
        # With an output gate, each head's rows are its query's and then its gate's.
        wide = 2 * q_dim if config.output_gate else q_dim
        self.adapted = bool(adapters)
        widths = (wide, kv_dim, kv_dim)
        self.qkv = adapted_linear(kernels, hidden, widths, adapters, bias=config.qkv_bias)
        self.out = adapted_linear(kernels, q_dim, hidden, adapters, bias=config.out_bias)
        self.q_norm: RMSNorm | LayerNorm | None = None
        self.k_norm: RMSNorm | LayerNorm | None = None
        if config.qk_norm is not None and config.qk_norm_whole:
            self.q_norm = WholeRMSNorm(kernels, q_dim, eps)
            self.k_norm = WholeRMSNorm(kernels, kv_dim, eps)
        elif config.qk_norm is not None:
            self.q_norm = norm(kernels, config.qk_norm, config.head_dim, eps)
            self.k_norm = norm(kernels, config.qk_norm, config.head_dim, eps)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape; the new keys and values end up in the cache."""
        config, kernels = self.config, self.kernels
        qkv = self.qkv(x, context.adapters) if self.adapted else self.qkv(x)
        qkv = qkv.unflatten(-1, (-1, config.head_dim))  # (tokens, heads + 2 kv, dim)
        kv_heads = config.kv_heads
        query, key, value = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
        gate = None
        if config.output_gate:
            query, gate = query.unflatten(1, (config.heads, 2)).unbind(2)
        if self.q_norm is not None and self.k_norm is not None and not config.qk_norm_last:
            query, key = self.q_norm(query), self.k_norm(key)
        if config.rope is not None:
            cos, sin = context.angles[config.rope]
            query = kernels.rope(query, cos, sin, config.rope.pairs)
            key = kernels.rope(key, cos, sin, config.rope.pairs)
        if self.q_norm is not None and self.k_norm is not None and config.qk_norm_last:
            query, key = self.q_norm(query), self.k_norm(key)
        if config.temperature is not None:
            query = query * tempered(context.positions[0], *config.temperature).to(query.dtype)
        keys, values = context.cache.keys[self.layer], context.cache.values[self.layer]
        kernels.write_kv(key, value, keys, values, context.batch.slot_mapping)
        attended = kernels.paged_attention(
            query,
            keys,
            values,
            context.batch,
            scale=self.scale,
            window=config.window,
            soft_cap=config.soft_cap,
            chunk=config.chunk,
        )
        if gate is not None:
            attended = attended * gate.sigmoid()
        attended = attended.flatten(1)
        return self.out(attended, context.adapters) if self.adapted else self.out(attended)


def tempered(positions: Tensor, every: float, weight: float, first: float) -> Tensor:
    """The factor on the queries at positions (tokens,): see `AttentionConfig.temperature`.

    Returns (tokens, 1, 1), float32.
    """
    steps = torch.floor((positions.float() + first) / every)
    return (torch.log1p(steps) * weight + 1.0)[:, None, None]
