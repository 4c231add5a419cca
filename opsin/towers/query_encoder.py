"""Learned queries that read a picture's features in a decoder-shaped transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.decoder.config import MLPConfig
from opsin.decoder.mlp import GatedMLP
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm
from opsin.nn.rope import RopeConfig, inverse_frequencies


@dataclass(frozen=True, slots=True)
class QueryEncoderConfig:
    """The transformer's shape; its keys are grouped and its positions rotary."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: MLPConfig
    rope: RopeConfig
    norm_eps: float = 1e-6


class QueryLayer(nn.Module):
    """Attention under a mask and a gated MLP, each behind a norm and added."""

    def __init__(self, kernels: Kernels, config: QueryEncoderConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        hidden, head_dim = config.hidden, config.hidden // config.heads
        self.scale = head_dim**-0.5
        widths = (hidden, config.kv_heads * head_dim, config.kv_heads * head_dim)
        self.attention_norm = norm(kernels, "rms", hidden, config.norm_eps)
        self.attention = nn.ModuleDict(
            {
                "qkv": Linear(kernels, hidden, widths, bias=True),
                "out": Linear(kernels, hidden, hidden),
            }
        )
        self.mlp_norm = norm(kernels, "rms", hidden, config.norm_eps)
        self.mlp = GatedMLP(kernels, config.mlp, hidden)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """x (pictures, tokens, hidden) to the same shape; bias (tokens, tokens)."""
        config = self.config
        pictures, tokens = x.shape[:2]
        qkv = self.attention["qkv"](self.attention_norm(x).flatten(0, 1))
        heads = qkv.unflatten(-1, (-1, config.hidden // config.heads))
        query, key, value = heads.split((config.heads, config.kv_heads, config.kv_heads), dim=1)
        query = self.kernels.rope(query, *angles, config.rope.pairs)
        key = self.kernels.rope(key, *angles, config.rope.pairs)
        attended = self.kernels.dense_attention(
            query, key, value, [tokens] * pictures, scale=self.scale, bias=bias
        )
        x = x + self.attention["out"](attended.flatten(1)).view(x.shape)
        return x + self.mlp(self.mlp_norm(x))


class QueryEncoder(nn.Module):
    """Features see each other; each query sees them all and the queries before it."""

    def __init__(self, kernels: Kernels, config: QueryEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(QueryLayer(kernels, config) for _ in range(config.layers))
        self.norm = norm(kernels, "rms", config.hidden, config.norm_eps)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        """features (pictures, n, hidden), queries (q, hidden) to (pictures, q, hidden)."""
        pictures, count = features.shape[:2]
        x = torch.cat((features, queries.expand(pictures, -1, -1)), dim=1)
        places = torch.arange(x.shape[1], device=x.device)
        frequencies, factor = inverse_frequencies(self.config.rope, x.device)
        turns = (places[:, None].float() * frequencies).repeat(pictures, 1)
        angles = (turns.cos() * factor, turns.sin() * factor)
        visible = (places[None] < count) | (places[None] <= places[:, None])
        bias = torch.zeros(visible.shape, dtype=x.dtype, device=x.device)
        bias.masked_fill_(~visible, -torch.inf)
        for layer in self.layers:
            x = layer(x, angles, bias)
        return self.norm(x[:, count:])
