"""Layers whose attention and feed-forward run side by side, and attention with learned factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsin.decoder.attention import Attention, StepContext
from opsin.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    FactoredAttentionConfig,
    MLPConfig,
    MoEConfig,
    ParallelLayerConfig,
    PlainMLPConfig,
)
from opsin.decoder.mlp import GatedMLP, PlainMLP
from opsin.decoder.moe import MixtureOfExperts
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm


class FactoredAttention(Attention):
    """See `FactoredAttentionConfig`; norms of queries, gates and adapters are not for it."""

    def __init__(
        self,
        kernels: Kernels,
        config: FactoredAttentionConfig,
        layer: int,
        hidden: int,
        eps: float,
    ) -> None:
        super().__init__(kernels, config, layer, hidden, eps)
        self.widths = self.qkv.splits
        width = sum(self.widths)
        self.query_factor = Linear(kernels, width, config.heads)
        self.value_factor = Linear(kernels, width, config.heads)
        self.place_factor = nn.Parameter(torch.empty(config.heads), requires_grad=False)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape; the new keys and values end up in the cache."""
        config, kernels = self.config, self.kernels
        projected = self.qkv(x)
        query, key, value = (
            part.unflatten(-1, (-1, config.head_dim)) for part in projected.split(self.widths, -1)
        )
        heard = kernels.activation(projected, "gelu")
        place = self._by_place(context.positions[0])
        of_query = (self.query_factor(heard).tanh() + place).to(query.dtype)
        of_value = (self.value_factor(heard).tanh() + place).to(value.dtype)
        query = query * of_query[..., None]
        value = value * of_value[:, : config.kv_heads, None]
        if config.rope is not None:
            cos, sin = context.angles[config.rope]
            query = kernels.rope(query, cos, sin, config.rope.pairs)
            key = kernels.rope(key, cos, sin, config.rope.pairs)
        keys, values = context.cache.keys[self.layer], context.cache.values[self.layer]
        kernels.write_kv(key, value, keys, values, context.batch.slot_mapping)
        attended = kernels.paged_attention(
            query, keys, values, context.batch, scale=self.scale, window=config.window
        )
        return self.out(attended.flatten(1))

    def _by_place(self, positions: Tensor) -> Tensor:
        """The part of a factor that positions (tokens,) alone give, (tokens, heads), float32."""
        distance = torch.log1p(positions.float())[:, None]
        return torch.sigmoid(self.place_factor.float() * distance) + 0.5


class ParallelLayer(nn.Module):
    """See `ParallelLayerConfig`."""

    def __init__(
        self, kernels: Kernels, config: ParallelLayerConfig, index: int, decoder: DecoderConfig
    ) -> None:
        super().__init__()
        hidden, eps = decoder.hidden, decoder.norm_eps
        self.norm = norm(kernels, decoder.norm, hidden, eps)
        self.attention: nn.Module
        if isinstance(config.attention, FactoredAttentionConfig):
            self.attention = FactoredAttention(kernels, config.attention, index, hidden, eps)
        else:
            assert isinstance(config.attention, AttentionConfig)
            self.attention = Attention(kernels, config.attention, index, hidden, eps)
        self.mlp: nn.Module
        if isinstance(config.mlp, MoEConfig):
            self.mlp = MixtureOfExperts(kernels, config.mlp, hidden)
        elif isinstance(config.mlp, PlainMLPConfig):
            self.mlp = PlainMLP(kernels, config.mlp, hidden)
        else:
            assert isinstance(config.mlp, MLPConfig)
            self.mlp = GatedMLP(kernels, config.mlp, hidden)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        normed = self.norm(x)
        return x + self.attention(normed, context) + self.mlp(normed)
