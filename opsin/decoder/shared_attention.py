"""Softmax attention that may read another layer's keys and values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from opsin.decoder.attention import Attention, StepContext
from opsin.decoder.config import AttentionConfig, SharedAttentionConfig
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm


class SharedAttention(Attention):
    """See `SharedAttentionConfig`; adapters, output gates and query temperatures are not for it."""

    def __init__(
        self,
        kernels: Kernels,
        config: AttentionConfig,
        layer: int,
        hidden: int,
        eps: float,
        adapters: Sequence[tuple[int, float]] = (),
    ) -> None:
        assert isinstance(config, SharedAttentionConfig)
        assert not adapters
        super().__init__(kernels, config, layer, hidden, eps)
        self.kind = config
        q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
        widths: tuple[int, ...] = (q_dim, kv_dim) if config.values_are_keys else self.qkv.splits
        if config.shared_from is not None:
            widths = (q_dim,)
            self.k_norm = None
        self.qkv = Linear(kernels, hidden, widths, bias=config.qkv_bias)
        self.v_norm = norm(kernels, "rms_plain", config.head_dim, eps)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        config, kernels = self.kind, self.kernels
        parts = self.qkv(x).unflatten(-1, (-1, config.head_dim))
        query = self._turned(parts[:, : config.heads], self.q_norm, context)
        keys, values = context.cache.keys[self.layer], context.cache.values[self.layer]
        if config.shared_from is None:
            plain = parts[:, config.heads : config.heads + config.kv_heads]
            value = self.v_norm(parts[:, -config.kv_heads :])
            key = self._turned(plain, self.k_norm, context)
            kernels.write_kv(key, value, keys, values, context.batch.slot_mapping)
        batch = context.batch
        if config.causal_only and batch.visible_until is not None:
            batch = dataclasses.replace(batch, visible_until=None, visible_from=None)
        attended = kernels.paged_attention(
            query,
            keys,
            values,
            batch,
            scale=self.scale,
            window=config.window,
            soft_cap=config.soft_cap,
        )
        return self.out(attended.flatten(1))

    def _turned(self, x: Tensor, normalise: object, context: StepContext) -> Tensor:
        """x (tokens, heads, dim), normalised and rotated."""
        config = self.kind
        x = normalise(x) if callable(normalise) else x
        if config.rope is None:
            return x
        return self.kernels.rope(x, *context.angles[config.rope], config.rope.pairs)
