"""Layers over several parallel streams, of which each computes one and predicts the others (AltUp,
arXiv:2301.13310).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from opsin.decoder.attention import StepContext
from opsin.decoder.config import (
    DecoderConfig,
    MLPConfig,
    SharedAttentionConfig,
    SparseMLPConfig,
    StreamsConfig,
    StreamsLayerConfig,
)
from opsin.decoder.mlp import GatedMLP, SparseMLP
from opsin.decoder.shared_attention import SharedAttention
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm

# The least mean square of a stream that is brought to another's magnitude.
LEAST = 1e-5


class Shortcut(nn.Module):
    """A low-rank learned path beside attention (LAuReL, arXiv:2411.07501)."""

    def __init__(self, kernels: Kernels, rank: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.down = Linear(kernels, hidden, rank)
        self.up = Linear(kernels, rank, hidden)
        self.norm = norm(kernels, "rms", hidden, eps)

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        added: Tensor = x + self.norm(self.up(self.down(x)))
        return added


class Update(nn.Module):
    """How a layer predicts the streams that it does not compute, and corrects them by the one that
    it does.
    """

    def __init__(self, kernels: Kernels, config: StreamsConfig, hidden: int, eps: float) -> None:
        super().__init__()
        self.config = config
        count = config.count
        self.norm = norm(kernels, "rms", hidden, eps)
        self.router = Linear(kernels, hidden, count)
        self.predict = Linear(kernels, count, count**2)
        self.correct = Linear(kernels, count, count)
        self.scale = nn.Parameter(torch.empty(hidden), requires_grad=False)

    def routed(self, x: Tensor) -> Tensor:
        """What x (tokens, hidden) says of all streams: (tokens, streams)."""
        routed = self.router(self.norm(x) * x.shape[-1] ** -1.0)
        return torch.tanh(routed.float()).to(x.dtype)

    def predicted(self, x: Tensor) -> Tensor:
        """x (tokens, streams, hidden) to the streams as they are expected after the layer."""
        count = self.config.count
        mixing = self.predict(self.routed(x[:, self.config.active])).unflatten(1, (count, count))
        return torch.baddbmm(x, mixing, x)

    def corrected(self, predicted: Tensor, computed: Tensor) -> Tensor:
        """predicted (tokens, streams, hidden) corrected by computed (tokens, hidden)."""
        news = computed - predicted[:, self.config.active]
        shares = self.correct(self.routed(computed)) + 1.0
        return torch.addcmul(predicted, shares[:, :, None], news[:, None])

    def active(self, x: Tensor) -> Tensor:
        """The computed stream of x (tokens, streams, hidden), scaled if the config says so."""
        chosen = x[:, self.config.active]
        return chosen * self.scale if self.config.scaled else chosen


class StreamsLayer(nn.Module):
    """See `StreamsLayerConfig`."""

    def __init__(
        self, kernels: Kernels, config: StreamsLayerConfig, index: int, decoder: DecoderConfig
    ) -> None:
        super().__init__()
        hidden, eps, kind = decoder.hidden, decoder.norm_eps, decoder.norm
        assert isinstance(config.attention, SharedAttentionConfig)
        assert isinstance(config.mlp, MLPConfig)
        assert decoder.streams is not None
        self.kernels, self.index = kernels, index
        self.activation = config.mlp.activation
        self.update = Update(kernels, decoder.streams, hidden, eps)
        self.attention_norm = norm(kernels, kind, hidden, eps)
        self.attention = SharedAttention(kernels, config.attention, index, hidden, eps)
        self.attention_post_norm = norm(kernels, kind, hidden, eps)
        self.shortcut = Shortcut(kernels, config.shortcut_rank, hidden, eps)
        self.mlp_norm = norm(kernels, kind, hidden, eps)
        sparse = isinstance(config.mlp, SparseMLPConfig)
        self.mlp = (SparseMLP if sparse else GatedMLP)(kernels, config.mlp, hidden)
        self.mlp_post_norm = norm(kernels, kind, hidden, eps)
        self.input_gate = Linear(kernels, hidden, config.input_dim)
        self.input_out = Linear(kernels, config.input_dim, hidden)
        self.input_norm = norm(kernels, kind, hidden, eps)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, streams, hidden) to the same shape."""
        predicted = self.update.predicted(x)
        own = predicted[:, self.update.config.active]
        normed = self.attention_norm(own)
        attended = own + self.attention_post_norm(self.attention(normed, context))
        mixed = (attended + self.shortcut(normed)) * math.sqrt(0.5)
        mixed = mixed + self.mlp_post_norm(self.mlp(self.mlp_norm(mixed)))
        x = self.update.corrected(predicted, mixed)
        assert context.layer_inputs is not None
        gate = self.kernels.activation(self.input_gate(self.update.active(x)), self.activation)
        added = self.input_norm(self.input_out(gate * context.layer_inputs[:, self.index]))
        x[:, 1:] += added[:, None]
        return x


class Streams(nn.Module):
    """Embeddings to several streams, and these back to one."""

    def __init__(self, kernels: Kernels, config: StreamsConfig, hidden: int) -> None:
        super().__init__()
        others = config.count - 1
        self.spread = Linear(kernels, hidden, (hidden,) * others)
        self.gather = nn.ModuleList(Linear(kernels, hidden, hidden) for _ in range(others))

    def opened(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) to (tokens, streams, hidden), all as large as the first."""
        others = self.spread(x).unflatten(1, (-1, x.shape[1]))
        return torch.cat((x[:, None], self.as_large(others, x[:, None])), dim=1)

    def closed(self, x: Tensor) -> Tensor:
        """x (tokens, streams, hidden) to the mean of its streams, (tokens, hidden)."""
        others = [part(x[:, i]) for i, part in enumerate(self.gather, 1)]
        first = x[:, :1]
        return torch.cat((first, self.as_large(torch.stack(others, 1), first)), dim=1).mean(dim=1)

    def as_large(self, others: Tensor, first: Tensor) -> Tensor:
        """others (tokens, n, hidden) at the magnitude of first (tokens, 1, hidden)."""
        wanted = first.square().mean(dim=-1, keepdim=True).sqrt()
        found = others.square().mean(dim=-1, keepdim=True).clamp(min=LEAST).sqrt()
        return others * wanted / found
