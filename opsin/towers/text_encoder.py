"""A text encoder whose tokens see each other in both directions (arXiv:1910.13461)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.decoder.config import PlainMLPConfig
from opsin.decoder.mlp import PlainMLP
from opsin.kernels import Activation, Kernels
from opsin.nn.linear import Embedding
from opsin.nn.norm import norm
from opsin.towers.vit import VisionAttention, ViTConfig


@dataclass(frozen=True, slots=True)
class TextEncoderConfig:
    """The encoder's shape; position p adds row p + `offset` of a table of `positions` rows."""

    hidden: int
    layers: int
    heads: int
    mlp_hidden: int
    positions: int
    offset: int = 0
    activation: Activation = "gelu"
    norm_eps: float = 1e-5


class TextEncoderLayer(nn.Module):
    """Attention, then feed-forward; the stream is normalised after each."""

    def __init__(self, kernels: Kernels, config: TextEncoderConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden, config.norm_eps
        shape = ViTConfig(hidden, hidden, config.layers, config.heads, config.mlp_hidden)
        self.attention = VisionAttention(kernels, shape)
        self.attention_norm = norm(kernels, "layer", hidden, eps)
        mlp = PlainMLPConfig(config.mlp_hidden, config.activation)
        self.mlp = PlainMLP(kernels, mlp, hidden)
        self.mlp_norm = norm(kernels, "layer", hidden, eps)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        x = self.attention_norm(x + self.attention(x, lengths, None))
        return self.mlp_norm(x + self.mlp(x))


class TextEncoder(nn.Module):
    """Embeddings to states, for any number of texts at once."""

    def __init__(self, kernels: Kernels, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = Embedding(config.positions, config.hidden)
        self.embedding_norm = norm(kernels, "layer", config.hidden, config.norm_eps)
        self.layers = nn.ModuleList(TextEncoderLayer(kernels, config) for _ in range(config.layers))

    def forward(self, embeds: Tensor, lengths: Sequence[int]) -> Tensor:
        """embeds (tokens, hidden) of texts of `lengths` tokens, one after another, to that shape.

        A text has at most as many tokens as there are positions.
        """
        places = torch.cat([torch.arange(length) for length in lengths]) + self.config.offset
        x = self.embedding_norm(embeds + self.positions(places.to(embeds.device)))
        runs = list(lengths)
        for layer in self.layers:
            x = layer(x, runs)
        return x
