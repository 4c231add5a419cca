"""Whisper's encoder (arXiv:2212.04356): two convolutions, then a transformer over 30 seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.kernels import Activation, Kernels
from opsin.nn.linear import Embedding
from opsin.nn.norm import norm
from opsin.towers.vit import VisionLayer, ViTConfig


@dataclass(frozen=True, slots=True)
class WhisperConfig:
    """The encoder's shape; `positions` is its length after the convolutions, which halve it.

    With a `chunk`, a vector sees those before it and the rest of its own chunk of so many.
    """

    mels: int
    hidden: int
    layers: int
    heads: int
    mlp_hidden: int
    positions: int = 1500
    activation: Activation = "gelu"
    embedding_scale: float = 1.0
    chunk: int = 0


class Convolution(nn.Module):
    """A convolution over time with a kernel of three."""

    def __init__(self, in_features: int, out_features: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        shape = (out_features, in_features, 3)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (sounds, in, time) to (sounds, out, time / stride)."""
        return F.conv1d(x, self.weight, self.bias, self.stride, padding=1)


class WhisperEncoder(nn.Module):
    """Log-mel features to one vector for every two frames."""

    def __init__(self, kernels: Kernels, config: WhisperConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        hidden = config.hidden
        self.first = Convolution(config.mels, hidden, 1)
        self.second = Convolution(hidden, hidden, 2)
        self.positions = Embedding(config.positions, hidden)
        shape = ViTConfig(
            patch_dim=hidden,
            hidden=hidden,
            layers=config.layers,
            heads=config.heads,
            mlp_hidden=config.mlp_hidden,
            activation=config.activation,
            norm_eps=1e-5,
            key_bias=False,
        )
        self.layers = nn.ModuleList(VisionLayer(kernels, shape) for _ in range(config.layers))
        self.norm = norm(kernels, "layer", hidden, 1e-5)

    def forward(self, features: Tensor) -> Tensor:
        """features (sounds, mels, frames) to (sounds, frames / 2, hidden)."""
        x = features.to(self.first.weight)
        for convolution in (self.first, self.second):
            x = self.kernels.activation(convolution(x), self.config.activation)
        x = x.transpose(1, 2) * self.config.embedding_scale
        sounds, length = x.shape[:2]
        x = (x + self.positions.weight[:length]).flatten(0, 1)
        bias = self._bias(length).to(x).expand(sounds, -1, -1, -1) if self.config.chunk else None
        for layer in self.layers:
            x = layer(x, [length] * sounds, None, bias)
        return self.norm(x).unflatten(0, (sounds, length))

    def _bias(self, length: int) -> Tensor:
        """What keeps each vector from seeing later chunks: (1, 1, length, length)."""
        chunks = torch.arange(length) // self.config.chunk
        later = chunks[None] > chunks[:, None]
        return torch.zeros(later.shape).masked_fill(later, float("-inf"))[None, None]
