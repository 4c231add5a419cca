"""Layers in which text reads encoded media: keys and values come from the source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsin.decoder.attention import StepContext
from opsin.decoder.config import CrossAttentionConfig, MLPConfig
from opsin.decoder.mlp import GatedMLP
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import NormKind, norm


class CrossAttention(nn.Module):
    """Attention of tokens over their sequence's source, whose keys are computed once."""

    def __init__(
        self, kernels: Kernels, config: CrossAttentionConfig, layer: int, hidden: int, eps: float
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        self.layer = layer
        q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = Linear(kernels, hidden, q_dim, bias=config.bias)
        self.source = Linear(kernels, hidden, (kv_dim, kv_dim), bias=config.bias)
        self.out = Linear(kernels, q_dim, hidden, bias=config.bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm is not None:
            self.q_norm = norm(kernels, config.qk_norm, config.head_dim, eps)
            self.k_norm = norm(kernels, config.qk_norm, config.head_dim, eps)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape; zero where a sequence has no source."""
        config, source = self.config, context.source
        assert source is not None
        keys, values = context.cache.keys[self.layer], context.cache.values[self.layer]
        assert isinstance(keys, Tensor)  # what encoded media leave is never quantised
        assert isinstance(values, Tensor)
        if source.states.shape[0]:
            fresh = self.source(source.states).unflatten(-1, (2, config.kv_heads, -1))
            key = self.k_norm(fresh[:, 0].contiguous())
            self.kernels.write_kv(key, fresh[:, 1], keys, values, source.slot_mapping)
        query = self.q_norm(self.query(x).unflatten(-1, (config.heads, -1)))
        scale = config.head_dim**-0.5
        attended = self.kernels.source_attention(
            query,
            keys,
            values,
            source.query_start,
            source.slots,
            source.masks,
            scale=scale,
        )
        return self.out(attended.flatten(1)) * source.present.to(x.dtype)


class CrossLayer(nn.Module):
    """Cross-attention, then feed-forward, each behind a norm and a learned gate that starts shut.

    A sequence without a source passes unchanged. A token of one with a source that sees none of it
    (it stands before the first picture) reads all of it, as the reference does, but skips the
    feed-forward.
    """

    def __init__(
        self,
        kernels: Kernels,
        attention: CrossAttentionConfig,
        mlp: MLPConfig,
        index: int,
        hidden: int,
        norm_kind: NormKind,
        eps: float,
    ) -> None:
        super().__init__()
        self.attention_norm = norm(kernels, norm_kind, hidden, eps)
        self.attention = CrossAttention(kernels, attention, index, hidden, eps)
        self.attention_gate = nn.Parameter(torch.empty(1), requires_grad=False)
        self.mlp_norm = norm(kernels, norm_kind, hidden, eps)
        self.mlp = GatedMLP(kernels, mlp, hidden)
        self.mlp_gate = nn.Parameter(torch.empty(1), requires_grad=False)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        if context.source is None:
            return x
        attended = self.attention(self.attention_norm(x), context)
        x = x + self.attention_gate.tanh() * attended
        mixed = self.mlp(self.mlp_norm(x)) * context.source.seen.to(x.dtype)
        return x + self.mlp_gate.tanh() * mixed
