"""A conformer over speech (arXiv:2005.08100): relative biases and causal convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.kernels import Activation, Kernels
from opsin.nn.linear import Embedding, Linear
from opsin.nn.norm import norm

# Longer sounds are cut into pieces of so many vectors, each encoded alone.
PIECE = 500


@dataclass(frozen=True, slots=True)
class ConformerConfig:
    """A conformer's shape.

    `reduction` is how many frames become one vector, in strided convolutions with `channels`
    channels. The bias depends on how far apart two vectors are, up to `max_distance`, and on which
    comes first unless it is `symmetric`.
    """

    mels: int
    hidden: int
    layers: int
    heads: int
    mlp_hidden: int
    channels: int
    conv_hidden: int
    depth_hidden: int
    kernel: int = 3
    reduction: int = 8
    max_distance: int = 1000
    symmetric: bool = False
    activation: Activation = "silu"
    conv_activation: Activation = "silu"
    gate_activation: Activation = "silu"
    first_activation: Activation = "relu"

    @property
    def reduced_mels(self) -> int:
        """Bins that the strided convolutions leave."""
        bins = self.mels
        for _ in range(self.reduction.bit_length() - 1):
            bins = (bins - 1) // 2 + 1
        return bins


class Kernel(nn.Module):
    """The weights of a convolution."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(shape[0]), requires_grad=False)


class Subsampling(nn.Module):
    """Strided convolutions over time and frequency, first by channel and then across."""

    def __init__(self, kernels: Kernels, config: ConformerConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.activation = config.first_activation
        channels = config.channels
        self.first = Kernel(channels, 1, 3, 3)
        stages = config.reduction.bit_length() - 2
        self.depth = nn.ModuleList(Kernel(channels, 1, 3, 3) for _ in range(stages))
        self.point = nn.ModuleList(Kernel(channels, channels, 1, 1) for _ in range(stages))
        self.out = Linear(kernels, channels * config.reduced_mels, config.hidden, bias=True)

    def forward(self, features: Tensor) -> Tensor:
        """features (frames, mels) to (frames / reduction, hidden)."""
        x = F.conv2d(features[None, None], self.first.weight, self.first.bias, 2, 1)
        x = self.kernels.activation(x, self.activation)
        for depth, point in zip(self.depth, self.point, strict=True):
            assert isinstance(depth, Kernel)
            assert isinstance(point, Kernel)
            x = F.conv2d(x, depth.weight, depth.bias, 2, 1, groups=x.shape[1])
            x = self.kernels.activation(F.conv2d(x, point.weight, point.bias), self.activation)
        return self.out(x[0].transpose(0, 1).flatten(1))


class FeedForward(nn.Module):
    """A gated block behind a norm: the values come first, then what gates them."""

    def __init__(self, kernels: Kernels, config: ConformerConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.activation = config.activation
        self.norm = norm(kernels, "layer", config.hidden, 1e-5)
        self.up_gate = Linear(kernels, config.hidden, 2 * config.mlp_hidden, bias=True)
        self.down = Linear(kernels, config.mlp_hidden, config.hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) to the same shape."""
        up, gate = self.up_gate(self.norm(x)).chunk(2, dim=-1)
        return self.down(up * self.kernels.activation(gate, self.activation))


class ConvolutionBlock(nn.Module):
    """A gated projection, a causal convolution of each channel, and two more projections."""

    def __init__(self, kernels: Kernels, config: ConformerConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        hidden, wide, depth = config.hidden, config.conv_hidden, config.depth_hidden
        self.norm = norm(kernels, "layer", hidden, 1e-5)
        self.up_gate = Linear(kernels, hidden, 2 * wide, bias=True)
        self.up_bias = nn.Parameter(torch.empty(wide, 1), requires_grad=False)
        self.gate_bias = nn.Parameter(torch.empty(wide, 1), requires_grad=False)
        self.depth = Kernel(wide, 1, config.kernel)
        self.point = Linear(kernels, wide, depth, bias=True)
        self.out = Linear(kernels, depth, hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (runs, length, hidden) to the same shape."""
        up, gate = self.up_gate(self.norm(x)).chunk(2, dim=-1)
        gate = self.kernels.activation(gate + self.gate_bias[:, 0], self.config.gate_activation)
        mixed = ((up + self.up_bias[:, 0]) * gate).transpose(1, 2)
        before = F.pad(mixed, (self.config.kernel - 1, 0))
        mixed = F.conv1d(before, self.depth.weight, self.depth.bias, groups=mixed.shape[1])
        point = self.point(mixed.transpose(1, 2))
        return self.out(self.kernels.activation(point, self.config.conv_activation))


class ConformerLayer(nn.Module):
    """Half a feed-forward block, attention, convolution, and the other half."""

    def __init__(self, kernels: Kernels, config: ConformerConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.heads = config.heads
        hidden = config.hidden
        self.first = FeedForward(kernels, config)
        self.attention_norm = norm(kernels, "layer", hidden, 1e-5)
        self.qkv = Linear(kernels, hidden, (hidden, hidden, hidden), bias=True)
        self.out = Linear(kernels, hidden, hidden, bias=True)
        self.convolution = ConvolutionBlock(kernels, config)
        self.second = FeedForward(kernels, config)
        self.norm = norm(kernels, "layer", hidden, 1e-5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (runs, length, hidden) to the same shape; bias (1, heads, length, length)."""
        x = x + 0.5 * self.first(x)
        runs, length = x.shape[:2]
        qkv = self.qkv(self.attention_norm(x)).flatten(0, 1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in qkv.chunk(3, dim=-1))
        attended = self.kernels.dense_attention(
            query, key, value, [length] * runs, scale=query.shape[-1] ** -0.5, bias=bias
        )
        x = x + self.out(attended.flatten(1)).unflatten(0, (runs, length))
        x = x + self.convolution(x)
        return self.norm(x + 0.5 * self.second(x))


class Conformer(nn.Module):
    """Log-mel features to one vector for every `reduction` frames."""

    def __init__(self, kernels: Kernels, config: ConformerConfig) -> None:
        super().__init__()
        self.config = config
        self.mean = nn.Parameter(torch.empty(config.mels), requires_grad=False)
        self.inverse_deviation = nn.Parameter(torch.empty(config.mels), requires_grad=False)
        self.subsampling = Subsampling(kernels, config)
        distances = config.max_distance * (1 if config.symmetric else 2)
        self.distances = Embedding(distances, config.heads)
        self.layers = nn.ModuleList(ConformerLayer(kernels, config) for _ in range(config.layers))

    def forward(self, features: Tensor) -> Tensor:
        """features (frames, mels) of one sound to (ceil(frames / reduction), hidden)."""
        x = (features.to(self.mean) - self.mean) * self.inverse_deviation
        x = self.subsampling(x)
        length = len(x)
        piece = min(length, PIECE)
        runs = F.pad(x, (0, 0, 0, -length % piece)).unflatten(0, (-1, piece))
        bias = self.bias(piece)
        for layer in self.layers:
            runs = layer(runs, bias)
        return runs.flatten(0, 1)[:length]

    def bias(self, length: int) -> Tensor:
        """What the scores of two vectors gain by their distance: (1, heads, length, length)."""
        most, places = self.config.max_distance, torch.arange(length)
        distance = (places[None, :] - places[:, None]).clamp(-most, most - 1)
        index = distance.abs() if self.config.symmetric else distance + most
        table = self.distances.weight
        return table[index.to(table.device)].permute(2, 0, 1)[None]
