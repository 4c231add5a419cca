"""Layers that normalise the stream after each block instead of before it (arXiv:1706.03762)."""

from __future__ import annotations

from torch import Tensor, nn

from opsin.decoder.attention import Attention, StepContext
from opsin.decoder.config import (
    AttentionConfig,
    CrossAttentionConfig,
    DecoderConfig,
    LayerConfig,
    PlainMLPConfig,
)
from opsin.decoder.cross_attention import CrossAttention
from opsin.decoder.mlp import PlainMLP
from opsin.kernels import Kernels
from opsin.nn.norm import norm


class PostNormLayer(nn.Module):
    """Attention over the tokens or over the source, then feed-forward if there is any.

    What each returns is added to the stream, and the sum normalised.
    """

    def __init__(
        self, kernels: Kernels, config: LayerConfig, index: int, decoder: DecoderConfig
    ) -> None:
        super().__init__()
        hidden, eps = decoder.hidden, decoder.norm_eps
        self.attention: nn.Module
        if isinstance(config.attention, CrossAttentionConfig):
            self.attention = CrossAttention(kernels, config.attention, index, hidden, eps)
        else:
            assert isinstance(config.attention, AttentionConfig)
            self.attention = Attention(kernels, config.attention, index, hidden, eps)
        self.attention_norm = norm(kernels, decoder.norm, hidden, eps)
        self.mlp = None
        if config.mlp is not None:
            assert isinstance(config.mlp, PlainMLPConfig)
            self.mlp = PlainMLP(kernels, config.mlp, hidden)
            self.mlp_norm = norm(kernels, decoder.norm, hidden, eps)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        x = self.attention_norm(x + self.attention(x, context))
        return x if self.mlp is None else self.mlp_norm(x + self.mlp(x))
