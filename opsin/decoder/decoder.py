"""The one text decoder: a stack of layers over a paged cache, driven by `DecoderConfig`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from opsin.decoder.attention import Attention, StepContext
from opsin.decoder.cache import PagedCache
from opsin.decoder.config import (
    AttentionConfig,
    CrossAttentionConfig,
    DecoderConfig,
    DeltaNetConfig,
    EnrichedLayerConfig,
    GroupedMoEConfig,
    LatentAttentionConfig,
    LayerConfig,
    LayerInputsConfig,
    MLPConfig,
    MoEConfig,
    ParallelLayerConfig,
    SharedAttentionConfig,
    StreamsLayerConfig,
)
from opsin.decoder.cross_attention import CrossLayer
from opsin.decoder.delta_net import DeltaNet
from opsin.decoder.latent_attention import LatentAttention
from opsin.decoder.mlp import GatedMLP
from opsin.decoder.moe import GroupedExperts, MixtureOfExperts
from opsin.decoder.parallel import ParallelLayer
from opsin.decoder.post_norm import PostNormLayer
from opsin.decoder.shared_attention import SharedAttention
from opsin.decoder.source import SourceStep
from opsin.decoder.streams import Streams, StreamsLayer
from opsin.kernels import AttentionBatch, Kernels
from opsin.kernels.cpu.stack import RopeTables, StackStep
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
    adapter i, None where no row uses any. `token_ids` (tokens,) are for decoders whose layers have
    inputs of their own. `long` (tokens, 1) is True for tokens of sequences that have outgrown the
    rope's short angles, None where no sequence has.
    """

    embeds: Tensor
    positions: Tensor
    batch: AttentionBatch
    logit_rows: Tensor
    layer_adds: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    source: SourceStep | None = None
    expert_groups: Tensor | None = None
    adapters: dict[int, Tensor] | None = None
    token_ids: Tensor | None = None
    long: Tensor | None = None


class NativeLayers(Protocol):
    """All layers, final norm and head in one call."""

    def run(self, step: Step, cache: PagedCache, angles: RotaryAngles) -> Tensor:
        """What `Decoder.forward` returns."""
        ...

    @property
    def takes_ids(self) -> bool:
        """Whether steps may come as token ids alone."""
        ...

    def embed(self, token_ids: list[int]) -> Tensor:
        """Embeddings (tokens, hidden), float32."""
        ...

    def turned(
        self, positions: Tensor | list[int], angles: RotaryAngles, long: Tensor | None = None
    ) -> tuple[RopeTables, list[int] | None]:
        """A step's `rope` and `rope_rows`; positions are a list where all axes have the same."""
        ...

    def compute(
        self, step: StackStep, cache: PagedCache, when_ready: Callable[[], None] = ...
    ) -> tuple[Tensor | None, list[int]]:
        """A step of plain integers: the logits, where they are wanted, and the largest of each row.

        `when_ready` is called as Python is about to be left.
        """
        ...


class Layer(nn.Module):
    """Attention, then feed-forward, each normalised before (and, if asked, after) and added."""

    def __init__(
        self, kernels: Kernels, config: LayerConfig, index: int, decoder: DecoderConfig
    ) -> None:
        super().__init__()
        hidden, eps = decoder.hidden, decoder.norm_eps
        self.residual_scale = config.residual_scale
        self.attention_norm: nn.Module = nn.Identity()
        if config.pre_norms:
            self.attention_norm = norm(kernels, decoder.norm, hidden, eps)
        self.attention: nn.Module
        if isinstance(config.attention, DeltaNetConfig):
            self.attention = DeltaNet(kernels, config.attention, index, hidden, eps)
        else:
            assert isinstance(config.attention, AttentionConfig)
            kind: type[Attention | LatentAttention] = Attention
            if isinstance(config.attention, SharedAttentionConfig):
                kind = SharedAttention
            elif isinstance(config.attention, LatentAttentionConfig):
                kind = LatentAttention
            self.attention = kind(kernels, config.attention, index, hidden, eps, decoder.adapters)
        self.mlp_norm: nn.Module = nn.Identity()
        if config.pre_norms:
            self.mlp_norm = norm(kernels, decoder.norm, hidden, eps)
        self.adapted = bool(decoder.adapters)
        self.mlp: nn.Module
        self.grouped = isinstance(config.mlp, GroupedMoEConfig)
        if isinstance(config.mlp, MoEConfig):
            self.mlp = MixtureOfExperts(kernels, config.mlp, hidden)
        elif isinstance(config.mlp, GroupedMoEConfig):
            self.mlp = GroupedExperts(kernels, config.mlp, hidden)
        else:
            assert isinstance(config.mlp, MLPConfig)
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


class StreamExperts(MixtureOfExperts):
    """Experts chosen by the stream, normalised and scaled; each has a learned weight of its own."""

    def __init__(self, kernels: Kernels, config: MoEConfig, decoder: DecoderConfig) -> None:
        super().__init__(kernels, config, decoder.hidden)
        self.choice_norm = norm(kernels, "rms_plain", decoder.hidden, decoder.norm_eps)
        self.choice_scale = nn.Parameter(torch.empty(decoder.hidden), requires_grad=False)
        self.expert_scale = nn.Parameter(torch.empty(config.experts), requires_grad=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and numbers of the experts of x (tokens, hidden)."""
        scaled = self.choice_norm(x) * self.choice_scale * x.shape[1] ** -0.5
        weights, experts = super().route(scaled)
        return weights * self.expert_scale[experts].to(weights.dtype), experts


class EnrichedLayer(Layer):
    """See `EnrichedLayerConfig`."""

    def __init__(
        self, kernels: Kernels, config: EnrichedLayerConfig, index: int, decoder: DecoderConfig
    ) -> None:
        super().__init__(kernels, config, index, decoder)
        hidden, eps = decoder.hidden, decoder.norm_eps
        self.kernels, self.index = kernels, index
        assert isinstance(config.mlp, MLPConfig)
        self.activation = config.mlp.activation
        self.experts = None
        if config.experts is not None:
            self.experts = StreamExperts(kernels, config.experts, decoder)
            self.dense_post_norm = norm(kernels, decoder.norm, hidden, eps)
            self.experts_norm = norm(kernels, decoder.norm, hidden, eps)
            self.experts_post_norm = norm(kernels, decoder.norm, hidden, eps)
        self.input_gate = None
        if config.input_dim:
            self.input_gate = Linear(kernels, hidden, config.input_dim)
            self.input_out = Linear(kernels, config.input_dim, hidden)
            self.input_norm = norm(kernels, decoder.norm, hidden, eps)
        self.scalar = None
        if config.scaled:
            self.scalar = nn.Parameter(torch.empty(1), requires_grad=False)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), context))
        mixed = self.mlp(self.mlp_norm(x))
        if self.experts is not None:
            routed = self.experts.routed(self.experts_norm(x), x)
            mixed = self.dense_post_norm(mixed) + self.experts_post_norm(routed)
        x = x + self.mlp_post_norm(mixed)
        if self.input_gate is not None:
            assert context.layer_inputs is not None
            gate = self.kernels.activation(self.input_gate(x), self.activation)
            own = self.input_out(gate * context.layer_inputs[:, self.index])
            x = x + self.input_norm(own)
        return x if self.scalar is None else x * self.scalar


class LayerInputs(nn.Module):
    """See `LayerInputsConfig`."""

    def __init__(self, kernels: Kernels, config: LayerInputsConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = len(decoder.layers) * config.dim
        self.table = Embedding(config.rows, width, config.dim**0.5)
        self.project = Linear(kernels, decoder.hidden, width)
        self.norm = norm(kernels, decoder.norm, config.dim, decoder.norm_eps)

    def forward(self, token_ids: Tensor, embeds: Tensor) -> Tensor:
        """token_ids (tokens,) and embeds (tokens, hidden) to (tokens, layers, dim)."""
        shape = (-1, self.config.dim)
        projected = (self.project(embeds) * embeds.shape[1] ** -0.5).unflatten(1, shape)
        token_ids = token_ids.masked_fill(token_ids >= self.config.rows, 0)
        return (self.norm(projected) + self.table(token_ids).unflatten(1, shape)) * 2.0**-0.5


def _layer(
    kernels: Kernels, config: LayerConfig, index: int, decoder: DecoderConfig
) -> Layer | CrossLayer | ParallelLayer | PostNormLayer | StreamsLayer:
    """A layer of the kind that its config is of."""
    attention, mlp = config.attention, config.mlp
    if config.sum_norms:
        return PostNormLayer(kernels, config, index, decoder)
    if isinstance(attention, CrossAttentionConfig):
        assert isinstance(mlp, MLPConfig)
        hidden, eps = decoder.hidden, decoder.norm_eps
        return CrossLayer(kernels, attention, mlp, index, hidden, decoder.norm, eps)
    if isinstance(config, ParallelLayerConfig):
        return ParallelLayer(kernels, config, index, decoder)
    if isinstance(config, StreamsLayerConfig):
        return StreamsLayer(kernels, config, index, decoder)
    if isinstance(config, EnrichedLayerConfig):
        return EnrichedLayer(kernels, config, index, decoder)
    return Layer(kernels, config, index, decoder)


class Decoder(nn.Module):
    """Embedding, layers, final norm and head of a causal language model."""

    def __init__(self, kernels: Kernels, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        extra = config.extra_embeddings
        words = config.vocab_parts or (config.vocab_size,)
        rows = (*words, extra) if extra else words
        self.embedding = Embedding(rows, config.hidden, config.embedding_scale)
        self.layers = nn.ModuleList(
            _layer(kernels, layer, i, config) for i, layer in enumerate(config.layers)
        )
        self.norm: nn.Module = nn.Identity()
        if config.final_norm:
            self.norm = norm(kernels, config.norm, config.hidden, config.norm_eps)
        self.positions = self.embedding_norm = self.head_bias = None
        if config.learned_positions is not None:
            self.positions = Embedding(config.learned_positions[0], config.hidden)
        if config.embedding_norm:
            self.embedding_norm = norm(kernels, config.norm, config.hidden, config.norm_eps)
        if config.head_bias:
            self.head_bias = nn.Parameter(torch.empty(config.vocab_size), requires_grad=False)
        self.layer_inputs = None
        if config.layer_inputs is not None:
            self.layer_inputs = LayerInputs(kernels, config.layer_inputs, config)
        self.streams = None
        if config.streams is not None:
            self.streams = Streams(kernels, config.streams, config.hidden)
        self.head = None if config.tied_head else Linear(kernels, config.hidden, words)
        self.own_rows: Tensor | None = None
        self.angles: RotaryAngles | None = None
        self.native: NativeLayers | None = None  # takes the layers over where it is there

    def finish_loading(self) -> None:
        """Build what depends on the device; called once, when every weight is in place."""
        self.angles = RotaryAngles(self.config.rope_configs, self.embedding.weight.device)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids (tokens,) to embeddings (tokens, hidden)."""
        embeds: Tensor = self.embedding(self.looked_up(token_ids))
        if self.own_rows is None:
            return embeds
        places = token_ids - (self.config.vocab_size - len(self.own_rows))
        own = self.own_rows[places.clamp(min=0)]
        return torch.where((places >= 0)[:, None], own, embeds)

    def set_own_rows(self, rows: Tensor) -> None:
        """Embed the last tokens of the vocabulary by rows (own_rows, hidden), not by the table."""
        assert len(rows) == self.config.own_rows
        self.own_rows = rows

    def looked_up(self, token_ids: Tensor) -> Tensor:
        """The ids whose rows stand for these tokens."""
        if not self.config.blank_ids:
            return token_ids
        blank = torch.tensor(self.config.blank_ids, device=token_ids.device)
        return token_ids.masked_fill(torch.isin(token_ids, blank), 0)

    def placed(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """Embeddings (tokens, hidden) with learned positions and norm, where there are any."""
        if self.positions is not None and self.config.learned_positions is not None:
            embeds = embeds + self.positions(positions[0] + self.config.learned_positions[1])
        return embeds if self.embedding_norm is None else self.embedding_norm(embeds)

    def inputs(self, step: Step) -> Tensor | None:
        """Every layer's own inputs of a step's tokens, (tokens, layers, dim), if it has any."""
        if self.layer_inputs is None:
            return None
        assert step.token_ids is not None
        inputs: Tensor = self.layer_inputs(self.looked_up(step.token_ids), step.embeds)
        return inputs

    def forward(self, step: Step, cache: PagedCache) -> Tensor:
        """Run one step and return the logits of `step.logit_rows`, (rows, vocab), float32."""
        assert self.angles is not None, "finish_loading() comes before the first step"
        if self.native is not None:
            return self.native.run(step, cache, self.angles)
        return self.logits(self.norm(self.stream(step, cache)))

    def stream(self, step: Step, cache: PagedCache) -> Tensor:
        """Run one step and return the stream after the last layer, before the norm, at
        `step.logit_rows`: (rows, hidden). Not for a native stack, which keeps it to itself.
        """
        assert self.angles is not None
        assert self.native is None
        angles = self.angles.at(step.positions, step.long)
        context = StepContext(
            cache,
            step.batch,
            step.positions,
            angles,
            step.source,
            step.expert_groups,
            step.adapters,
            self.inputs(step),
        )
        x = step.embeds if self.streams is None else self.streams.opened(step.embeds)
        x = self.placed(x, step.positions)
        for i, layer in enumerate(self.layers):
            x = layer(x, context)
            if i in step.layer_adds:
                rows, values = step.layer_adds[i]
                x.index_add_(0, rows, values.to(x.dtype))
        x = x[step.logit_rows]
        return x if self.streams is None else self.streams.closed(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states (rows, hidden) to logits (rows, vocab), float32."""
        if self.head is None:
            logits = self.embedding.as_head(hidden, self.kernels).float()
        else:
            logits = self.head(hidden).float()
        if self.head_bias is not None:
            logits = logits + self.head_bias
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_soft_cap is not None:
            logits = torch.tanh(logits / self.config.logit_soft_cap) * self.config.logit_soft_cap
        return logits
