"""A Universal Speech Model (arXiv:2303.01037): strided convolutions, then conformer layers that see
a short past.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.kernels import Activation, Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm
from opsin.towers.clipped import ClippedLinear

MELS = 128
# What a key outside the past scores, after the cap.
UNSEEN = -1e9


@dataclass(frozen=True, slots=True)
class USMConfig:
    """The encoder's shape.

    `channels` are the two convolutions'. A vector sees itself and the `past` - 1 before it. `out`
    is the width that the result is projected to, 0 for none; one vector in `every` is kept.
    `scaled_keys` multiplies keys by a constant. With `running_eps`, the convolutions look at frames
    to come and not past ones, and are normalised over all channels and bins so far, with it under
    the root.
    """

    hidden: int
    layers: int
    heads: int
    channels: tuple[int, int]
    out: int
    past: int
    kernel: int = 5
    cap: float = 50.0
    half_step: float = 0.5
    activation: Activation = "silu"
    norm_eps: float = 1e-6
    clipped: bool = True
    every: int = 1
    scaled_keys: bool = True
    running_eps: float | None = None


class Stride(nn.Module):
    """A convolution that halves time and frequency, a norm over channels, and a cut at zero."""

    def __init__(self, kernels: Kernels, inside: int, outside: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outside, inside, 3, 3), requires_grad=False)
        self.norm: nn.Module = norm(kernels, "layer", outside, eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (1, in, time, bins) to (1, out, time / 2, bins / 2)."""
        x = F.conv2d(x, self.weight, None, 2, 1).permute(0, 2, 3, 1)
        return F.relu(self.norm(x)).permute(0, 3, 1, 2)


class RunningNorm(nn.Module):
    """A norm over all channels and bins up to each time, in float32, with a weight a channel."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (1, time, bins, channels) to the same shape."""
        wide = x.float()
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None, None] * wide[0, 0].numel()
        away = wide - wide.sum((2, 3), keepdim=True).cumsum(1) / count
        spread = away.square().sum((2, 3), keepdim=True).cumsum(1) / count
        return (away * (spread + self.eps).rsqrt() * self.weight.float()).to(x.dtype)


class AheadStride(Stride):
    """The same, of each time and the two after it, normalised over all that came before."""

    def __init__(self, kernels: Kernels, inside: int, outside: int, eps: float) -> None:
        super().__init__(kernels, inside, outside, eps)
        self.norm: nn.Module = RunningNorm(outside, eps)

    def forward(self, x: Tensor) -> Tensor:
        """x (1, in, time, bins) to (1, out, time / 2, bins / 2)."""
        x = F.conv2d(F.pad(x, (1, 1, 0, 2)), self.weight, None, 2).permute(0, 2, 3, 1)
        return F.relu(self.norm(x)).permute(0, 3, 1, 2)


class USMFeedForward(nn.Module):
    """Half a step of a feed-forward block, normalised before and after."""

    def __init__(self, kernels: Kernels, config: USMConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        hidden, clip = config.hidden, config.clipped
        self.pre_norm = norm(kernels, "rms", hidden, 1e-6)
        self.up = ClippedLinear(kernels, hidden, 4 * hidden, clipped=clip)
        self.down = ClippedLinear(kernels, 4 * hidden, hidden, clipped=clip)
        self.post_norm = norm(kernels, "rms", hidden, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """x (time, hidden) to the same shape."""
        mixed = self.kernels.activation(self.up(self.pre_norm(x)), self.config.activation)
        return x + self.post_norm(self.down(mixed)) * self.config.half_step


class USMAttention(nn.Module):
    """Attention over a short past, in float32, scored by content and by distance."""

    def __init__(self, kernels: Kernels, config: USMConfig) -> None:
        super().__init__()
        self.config = config
        hidden, clip = config.hidden, config.clipped
        self.q = ClippedLinear(kernels, hidden, hidden, clipped=clip)
        self.k = ClippedLinear(kernels, hidden, hidden, clipped=clip)
        self.v = ClippedLinear(kernels, hidden, hidden, clipped=clip)
        self.o = ClippedLinear(kernels, hidden, hidden, clipped=clip)
        self.distance = Linear(kernels, hidden, hidden)
        self.per_dim_scale = nn.Parameter(torch.empty(hidden // config.heads), requires_grad=False)

    def forward(self, x: Tensor, waves: Tensor) -> Tensor:
        """x (time, hidden) to the same shape; waves (past, hidden) stand for the distances."""
        past, heads, time = self.config.past, self.config.heads, x.shape[0]
        query, key, value = (
            part(x).float().unflatten(-1, (heads, -1)).transpose(0, 1)
            for part in (self.q, self.k, self.v)
        )  # (heads, time, dim)
        base = query.shape[-1] ** -0.5 / math.log(2)
        query = query * base * F.softplus(self.per_dim_scale.float())
        if self.config.scaled_keys:
            key = key * (math.log(1 + math.e) / math.log(2))
        far = self.distance(waves.to(x.dtype)).float().unflatten(-1, (heads, -1)).permute(1, 2, 0)
        # Each query meets its own window: itself, then one before it, and so on.
        steps = torch.arange(past, device=x.device)
        places = torch.arange(time, device=x.device)[:, None] - steps  # (time, past)
        near = places.clamp(min=0)
        scores = (query[:, :, None] * key[:, near]).sum(-1) + query @ far  # (heads, time, past)
        scores = torch.tanh(scores / self.config.cap) * self.config.cap
        weights = scores.masked_fill(places < 0, UNSEEN).softmax(dim=-1)
        attended = (weights[..., None] * value[:, near]).sum(2)
        return self.o(attended.transpose(0, 1).flatten(1).to(x.dtype))


class USMConvolution(nn.Module):
    """A gated projection and a causal convolution of each channel, added."""

    def __init__(self, kernels: Kernels, config: USMConfig) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        hidden, clip = config.hidden, config.clipped
        self.pre_norm = norm(kernels, "rms", hidden, config.norm_eps)
        self.start = ClippedLinear(kernels, hidden, 2 * hidden, clipped=clip)
        shape = (hidden, 1, config.kernel)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.norm = norm(kernels, "rms", hidden, config.norm_eps)
        self.end = ClippedLinear(kernels, hidden, hidden, clipped=clip)

    def forward(self, x: Tensor) -> Tensor:
        """x (time, hidden) to the same shape."""
        gated = F.glu(self.start(self.pre_norm(x)), dim=-1).T[None]
        padded = F.pad(gated, (self.config.kernel - 1, 0))
        mixed = F.conv1d(padded, self.weight, groups=x.shape[1])[0].T
        return x + self.end(self.kernels.activation(self.norm(mixed), self.config.activation))


class USMLayer(nn.Module):
    """Half a feed-forward step, attention, convolution, and the other half."""

    def __init__(self, kernels: Kernels, config: USMConfig) -> None:
        super().__init__()
        self.first = USMFeedForward(kernels, config)
        self.attention_norm = norm(kernels, "rms", config.hidden, 1e-6)
        self.attention = USMAttention(kernels, config)
        self.attention_post_norm = norm(kernels, "rms", config.hidden, 1e-6)
        self.convolution = USMConvolution(kernels, config)
        self.second = USMFeedForward(kernels, config)
        self.norm = norm(kernels, "rms", config.hidden, 1e-6)

    def forward(self, x: Tensor, waves: Tensor) -> Tensor:
        """x (time, hidden) to the same shape."""
        x = self.first(x)
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), waves))
        return self.norm(self.second(self.convolution(x)))


class USMEncoder(nn.Module):
    """Log-mel features to one vector for every four frames, or fewer."""

    def __init__(self, kernels: Kernels, config: USMConfig) -> None:
        super().__init__()
        self.config = config
        first, second = config.channels
        ahead, eps = config.running_eps, config.norm_eps
        stride, eps = (Stride, eps) if ahead is None else (AheadStride, ahead)
        self.first = stride(kernels, 1, first, eps)
        self.second = stride(kernels, first, second, eps)
        self.project = Linear(kernels, MELS // 4 * second, config.hidden)
        self.layers = nn.ModuleList(USMLayer(kernels, config) for _ in range(config.layers))
        self.out: nn.Module = nn.Identity()
        if config.out:
            self.out = Linear(kernels, config.hidden, config.out, bias=True)

    def forward(self, features: Tensor) -> Tensor:
        """features (frames, mels) of one sound to (ceil(ceil(frames / 4) / every), width)."""
        x = self.second(self.first(features.to(self.project.weight)[None, None]))
        x = self.project(x[0].permute(1, 2, 0).flatten(1))
        waves = self.waves(x.device)
        for layer in self.layers:
            x = layer(x, waves)
        return self.out(x[:: self.config.every])

    def waves(self, device: torch.device) -> Tensor:
        """Sines and cosines of each distance into the past, (past, hidden)."""
        count = self.config.hidden // 2
        rate = math.log(10000.0) / max(count - 1, 1)
        slow = torch.exp(torch.arange(count, device=device) * -rate)
        angles = torch.arange(self.config.past, device=device)[:, None] * slow
        return torch.cat((angles.sin(), angles.cos()), dim=-1)
