"""The one text decoder: a stack of layers over a paged cache, driven by `DecoderConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opsin.decoder.attention import Attention, StepContext
from opsin.decoder.cache import PagedCache
from opsin.decoder.config import (
    AttentionConfig,
    CrossAttentionConfig,
    DecoderConfig,
    DeltaNetConfig,
    GroupedMoEConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
)
from opsin.decoder.cross_attention import CrossLayer
from opsin.decoder.delta_net import DeltaNet
from opsin.decoder.mlp import GatedMLP
from opsin.decoder.moe import GroupedExperts, MixtureOfExperts
from opsin.decoder.source import SourceStep
from opsin.kernels import AttentionBatch, Kernels
from opsin.nn.linear import Embedding, Linear
from opsin.nn.norm import norm
from opsin.nn.rope import RotaryAngles


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens of one forward pass, all sequences one after another.

    embeds (tokens, hidden) already holds the media's embeddings; positions (axes, tokens), one axis
    or three; `layer_adds[i]` is (rows, values): values (n, hidden) added to those rows of the
    stream after layer i. `logit_rows` (n,) are the rows whose logits are wanted. `source` is what
    cross-attention layers read. `expert_groups` (tokens,) sends each token to a group of experts
    where a decoder has several; None is group 0 for all. adapters[i] (n,) are the rows that use
    adapter i, None where no row uses any.
    """

    embeds: Tensor
    positions: Tensor
    batch: AttentionBatch
    logit_rows: Tensor
    layer_adds: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    source: SourceStep | None = None
    expert_groups: Tensor | None = None
    adapters: dict[int, Tensor] | None = None


class Layer(nn.Module):
    """Attention, then feed-forward, each normalised before (and, if asked, after) and added."""

    def __init__(
        self, kernels: Kernels, config: LayerConfig, index: int, decoder: DecoderConfig
    ) -> None:
        super().__init__()
        hidden, eps = decoder.hidden, decoder.norm_eps
        self.residual_scale = config.residual_scale
        self.attention_norm = norm(kernels, decoder.norm, hidden, eps)
        self.attention: nn.Module
        if isinstance(config.attention, DeltaNetConfig):
            self.attention = DeltaNet(kernels, config.attention, index, hidden, eps)
        else:
            assert isinstance(config.attention, AttentionConfig)
            self.attention = Attention(
                kernels, config.attention, index, hidden, eps, decoder.adapters
            )
        self.mlp_norm = norm(kernels, decoder.norm, hidden, eps)
        self.adapted = bool(decoder.adapters)
        self.mlp: nn.Module
        self.grouped = isinstance(config.mlp, GroupedMoEConfig)
        if isinstance(config.mlp, MoEConfig):
            self.mlp = MixtureOfExperts(kernels, config.mlp, hidden)
        elif isinstance(config.mlp, GroupedMoEConfig):
            self.mlp = GroupedExperts(kernels, config.mlp, hidden)
        else:
            self.mlp = GatedMLP(kernels, config.mlp, hidden, decoder.adapters)
        self.attention_post_norm: nn.Module = nn.Identity()
        self.mlp_post_norm: nn.Module = nn.Identity()
        if config.post_norms:
            self.attention_post_norm = norm(kernels, decoder.norm, hidden, eps)
            self.mlp_post_norm = norm(kernels, decoder.norm, hidden, eps)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        attended = self.attention_post_norm(self.attention(self.attention_norm(x), context))
        x = torch.add(x, attended, alpha=self.residual_scale)
        mixed = self.mlp_norm(x)
        if self.grouped:
            mixed = self.mlp(mixed, context.expert_groups)
        else:
            mixed = self.mlp(mixed, context.adapters) if self.adapted else self.mlp(mixed)
        mixed = self.mlp_post_norm(mixed)
        return torch.add(x, mixed, alpha=self.residual_scale)


def _layer(
    kernels: Kernels, config: LayerConfig, index: int, decoder: DecoderConfig
) -> Layer | CrossLayer:
    """A layer of the kind that its config is of."""
    attention, mlp = config.attention, config.mlp
    if isinstance(attention, CrossAttentionConfig):
        assert isinstance(mlp, MLPConfig)
        hidden, eps = decoder.hidden, decoder.norm_eps
        return CrossLayer(kernels, attention, mlp, index, hidden, decoder.norm, eps)
    return Layer(kernels, config, index, decoder)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head of a causal language model."""

    def __init__(self, kernels: Kernels, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        rows = config.vocab_size + config.extra_embeddings
        self.embedding = Embedding(rows, config.hidden, config.embedding_scale)
        self.layers = nn.ModuleList(
            _layer(kernels, layer, i, config) for i, layer in enumerate(config.layers)
        )
        self.norm = norm(kernels, config.norm, config.hidden, config.norm_eps)
        self.head = None if config.tied_head else Linear(kernels, config.hidden, config.vocab_size)
        self.angles: RotaryAngles | None = None

    def finish_loading(self) -> None:
        """Build what depends on the device; called once, when every weight is in place."""
        self.angles = RotaryAngles(self.config.rope_configs, self.embedding.weight.device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids (tokens,) to embeddings (tokens, hidden)."""
        return self.embedding(token_ids)

    def forward(self, step: Step, cache: PagedCache) -> Tensor:
        """Run one step and return the logits of `step.logit_rows`, (rows, vocab), float32."""
        assert self.angles is not None, "finish_loading() comes before the first step"
        angles = self.angles.at(step.positions)
        context = StepContext(
            cache,
            step.batch,
            step.positions,
            angles,
            step.source,
            step.expert_groups,
            step.adapters,
        )
        x = step.embeds
        for i, layer in enumerate(self.layers):
            x = layer(x, context)
            if i in step.layer_adds:
                rows, values = step.layer_adds[i]
                x.index_add_(0, rows, values.to(x.dtype))
        return self.logits(self.norm(x[step.logit_rows]))

    def logits(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states (rows, hidden) to logits (rows, vocab), float32."""
        if self.head is None:
            logits = self.kernels.linear(hidden, self.embedding.weight, None).float()
        else:
            logits = self.head(hidden).float()
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_soft_cap is not None:
            logits = torch.tanh(logits / self.config.logit_soft_cap) * self.config.logit_soft_cap
        return logits
