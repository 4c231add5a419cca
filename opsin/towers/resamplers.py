"""From any number of features to a fixed number, by learned queries that attend to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.decoder.config import MLPConfig
from opsin.decoder.mlp import GatedMLP
from opsin.kernels import Activation, Kernels
from opsin.kernels.interface import attend
from opsin.nn.linear import Linear
from opsin.nn.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class PerceiverConfig:
    """A perceiver resampler's shape (arXiv:2204.14198); `latents` is the number it returns."""

    hidden: int
    latents: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_hidden: int
    activation: Activation = "silu"
    norm_eps: float = 1e-6


class PerceiverAttention(nn.Module):
    """Latents attend to the features of their own picture and to each other."""

    def __init__(self, kernels: Kernels, config: PerceiverConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = Linear(kernels, config.hidden, q_dim)
        self.key_value = Linear(kernels, config.hidden, (kv_dim, kv_dim))
        self.out = Linear(kernels, q_dim, config.hidden)

    def forward(self, latents: Tensor, features: Tensor, lengths: list[int]) -> Tensor:
        """latents (runs, latents, hidden), features (sum of lengths, hidden) to latents' shape."""
        query = self.query(latents).unflatten(-1, (-1, self.head_dim))
        parts = zip(features.split(lengths), latents, strict=True)
        seen = [torch.cat(pair) for pair in parts]
        keys = self.key_value(torch.cat(seen)).unflatten(-1, (2, -1, self.head_dim))
        attended = [
            attend(q, kv[:, 0], kv[:, 1], None, self.head_dim**-0.5, None, None)
            for q, kv in zip(query, keys.split([len(part) for part in seen]), strict=True)
        ]
        return self.out(torch.stack(attended).flatten(-2))


class PerceiverLayer(nn.Module):
    """Attention over features and latents, then a gated MLP."""

    def __init__(self, kernels: Kernels, config: PerceiverConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden, config.norm_eps
        self.latents_norm = RMSNorm(kernels, hidden, eps)
        self.context_norm = RMSNorm(kernels, hidden, eps)
        self.attention = PerceiverAttention(kernels, config)
        self.mlp_norm = RMSNorm(kernels, hidden, eps)
        self.mlp = GatedMLP(kernels, MLPConfig(config.mlp_hidden, config.activation), hidden)

    def forward(self, latents: Tensor, features: Tensor, lengths: list[int]) -> Tensor:
        """latents (runs, latents, hidden) to the same shape."""
        normed = self.latents_norm(latents), self.context_norm(features)
        latents = latents + self.attention(*normed, lengths)
        return latents + self.mlp(self.mlp_norm(latents))


class PerceiverResampler(nn.Module):
    """Learned latents, refined layer by layer from a picture's features."""

    def __init__(self, kernels: Kernels, config: PerceiverConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.latents, config.hidden), requires_grad=False)
        self.layers = nn.ModuleList(PerceiverLayer(kernels, config) for _ in range(config.layers))
        self.norm = RMSNorm(kernels, config.hidden, config.norm_eps)

    def forward(self, features: Tensor, lengths: list[int]) -> Tensor:
        """features (sum of lengths, hidden) to (runs, latents, hidden)."""
        latents = self.latents.expand(len(lengths), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features, lengths)
        return self.norm(latents)
