"""What a text decoder is made of, as plain facts read from a checkpoint's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from opsin.kernels import Activation
from opsin.nn.norm import NormKind
from opsin.nn.rope import RopeConfig, long_after


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Softmax attention with grouped keys (arXiv:2305.13245).

    `window` limits how many of the last keys are seen, the token itself included; `rope` None means
    no positions; `scale` None means 1 / sqrt(head_dim); `qk_norm` normalises each head's query and
    key, before rope or (`qk_norm_last`) after it, or all heads' together (`qk_norm_whole`).
    `soft_cap` caps the scores. `output_gate` multiplies each head's result by the sigmoid of a gate
    that is projected beside its query. `chunk` lets a token see only the keys of its own run of so
    many positions. `temperature` (every, weight, first) multiplies the query at position p by 1 +
    weight * ln(1 + floor((p + first) / every)) (arXiv:2501.19399).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig | None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormKind | None = None
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    output_gate: bool = False
    qk_norm_last: bool = False
    chunk: int | None = None
    temperature: tuple[float, float, float] | None = None
    qk_norm_whole: bool = False
    # Whether a token's values are part of its cached keys, and have no rows of their own.
    values_in_keys: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class LatentAttentionConfig(AttentionConfig):
    """Softmax attention over one small vector a token (multi-head latent attention,
    arXiv:2405.04434).

    The cache keeps, for all heads in common, a key part that turns, of `rope.dim` values, and a
    normalised vector of `latent` values: kv_heads is 1 and head_dim their sum. A head's key is
    `plain_dim` values that it makes of the vector, beside the part that turns; so is its value, of
    `value_dim`. Queries are made through a normalised vector of `query_rank` values where that is
    set. `latent_eps` is for both norms; `qkv_bias` goes to what makes the two vectors.
    """

    latent: int = 0
    plain_dim: int = 0
    value_dim: int = 0
    query_rank: int | None = None
    latent_eps: float = 1e-6
    values_in_keys: ClassVar[bool] = True

    @property
    def many(self) -> float:
        """From how many new tokens of a sequence on its keys and values are worth writing out.

        Each key and value costs `latent` products a number to make, and then spares every query,
        which scores and sums, the difference between the vector and a head's own part.
        """
        spared = 2 * (self.latent - self.plain_dim)
        made = self.latent * (self.plain_dim + self.value_dim)
        return made / spared if spared > 0 else float("inf")


@dataclass(frozen=True, slots=True)
class SharedAttentionConfig(AttentionConfig):
    """Softmax attention whose keys and values may come from elsewhere.

    `shared_from` is the layer whose cached keys and values are read, in place of own ones;
    `values_are_keys` takes the projected keys, before their norm, for values. Values are normalised
    without a weight. With `causal_only`, runs that are seen in both directions elsewhere are not
    here.
    """

    shared_from: int | None = None
    values_are_keys: bool = False
    causal_only: bool = False


@dataclass(frozen=True, slots=True)
class FactoredAttentionConfig(AttentionConfig):
    """Softmax attention with learned factors on each head's query and value.

    With `factors`, a factor is tanh(W gelu(x)) + 1 / 2 + sigmoid(a ln(1 + position)): x is all that
    is projected of the token, W is apart for queries and values, and each head has its own a.
    """

    factors: bool = False


@dataclass(frozen=True, slots=True)
class DeltaNetConfig:
    """A gated delta network (arXiv:2412.06464), whose state does not grow with the sequence.

    Each query and key head serves value_heads / key_heads value heads; `conv_kernel` is the width
    of the causal convolution before them.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int

    @property
    def mixed_dims(self) -> tuple[int, int, int]:
        """Features of all queries, all keys and all values."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.value_heads * self.value_dim

    @property
    def conv_dim(self) -> int:
        """Features that the convolution runs over."""
        return sum(self.mixed_dims)

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """What one sequence remembers beside the convolution's inputs."""
        return self.value_heads, self.key_dim, self.value_dim


@dataclass(frozen=True, slots=True)
class CrossAttentionConfig:
    """Attention of the text over encoded media, without positions; see `CrossLayer`.

    `qk_norm` normalises each head's query and key.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    qk_norm: NormKind | None = None


@dataclass(frozen=True, slots=True)
class MLPConfig:
    """A gated feed-forward block: down(activation(gate x) * up x)."""

    hidden: int
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True, slots=True)
class SparseMLPConfig(MLPConfig):
    """A gated block in which about a share 1 - `sparsity` of the gates pass (statistical top-k).

    Gates count from where that share would begin, were they normally distributed with the mean and
    deviation that they have.
    """

    sparsity: float = 0.0


@dataclass(frozen=True, slots=True)
class PlainMLPConfig:
    """A feed-forward block of two layers with biases: down(activation(up x))."""

    hidden: int
    activation: Activation = "gelu"


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """A mixture of experts: gated blocks of inner width `hidden`, `top_k` of them for a token.

    `router` makes the scores that weigh the chosen experts; `normalise` divides them by their sum,
    which counts as at least `min_total`; `scale` multiplies them. `precise_router` scores in
    float32 whatever the model computes in, and `router_bias` adds a learned bias before anything
    else. `up_offset` is added to what an expert's gate multiplies. `limits` (groups, kept) allows a
    token experts of only so many of as many equal groups, those whose best `limits_by` experts have
    the highest sum.
    `selection_bias` is a learned bias that only the choice sees. `weigh_input` applies the weights
    to what the experts read rather than to what they return. `shared` is a block that every token
    goes through, `shared_gate` puts a sigmoid gate on it.
    """

    experts: int
    top_k: int
    hidden: int
    activation: Activation = "silu"
    router: Literal["softmax", "sigmoid"] = "softmax"
    precise_router: bool = False
    normalise: bool = True
    min_total: float = 0.0
    scale: float = 1.0
    limits: tuple[int, int] | None = None
    selection_bias: bool = False
    weigh_input: bool = False
    shared: MLPConfig | None = None
    shared_gate: bool = False
    router_bias: bool = False
    up_offset: float = 0.0
    limits_by: int = 1


@dataclass(frozen=True, slots=True)
class GroupedMoEConfig:
    """Several mixtures of experts, of which each token goes through one by what it stands for.

    Group 0 is for text, group 1 for media. `shared` is a block that every token goes through.
    `selection_bias` is as in `MoEConfig`, for all groups at once.
    """

    groups: tuple[MoEConfig, ...]
    shared: MLPConfig | None = None
    selection_bias: bool = False


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One decoder layer: attention and feed-forward, each behind a norm and added to the stream.

    `post_norms` also normalises what each block returns, before it is added; without `pre_norms`
    that is all. With `sum_norms`,
    nothing is normalised before a block, but the stream after each (arXiv:1706.03762); such a layer
    has a plain feed-forward block, or None where the next layer goes on reading.
    """

    attention: AttentionConfig | DeltaNetConfig | CrossAttentionConfig
    mlp: MLPConfig | MoEConfig | GroupedMoEConfig | PlainMLPConfig | None
    post_norms: bool = False
    residual_scale: float = 1.0
    sum_norms: bool = False
    pre_norms: bool = True


@dataclass(frozen=True, slots=True)
class EnrichedLayerConfig(LayerConfig):
    """A layer that also takes a token's own input for it, scales its result, or runs experts beside
    its feed-forward block.

    `input_dim` is the width of a token's input for the layer, 0 for none; `scaled` multiplies what
    the layer returns by a learned number. `experts` read the stream through a norm of their own,
    are chosen by the stream, and are added to the block after both have been normalised.
    """

    input_dim: int = 0
    scaled: bool = False
    experts: MoEConfig | None = None


@dataclass(frozen=True, slots=True)
class ParallelLayerConfig(LayerConfig):
    """A layer whose attention and feed-forward read the stream through the same norm, side by side,
    and are both added to it (arXiv:2204.02311).
    """


@dataclass(frozen=True, slots=True)
class StreamsLayerConfig(LayerConfig):
    """A layer over a decoder's parallel streams, with inputs of its own for each token.

    Attention, with a learned shortcut of `shortcut_rank` beside it, and feed-forward compute one
    stream; `input_dim` is the width of a token's input for the layer, which goes to all but the
    first.
    """

    shortcut_rank: int = 0
    input_dim: int = 0


@dataclass(frozen=True, slots=True)
class StreamsConfig:
    """Parallel streams of a decoder (AltUp, arXiv:2301.13310).

    There are `count`, of which layers compute number `active`; `scaled` multiplies it by a learned
    vector where a token's input for the layer meets it.
    """

    count: int
    active: int = 0
    scaled: bool = True


@dataclass(frozen=True, slots=True)
class LayerInputsConfig:
    """Inputs of every layer for every token: from a table of their own and from its embedding.

    The table has `rows` rows of `dim` features a layer; tokens after them are looked up as token 0.
    """

    rows: int
    dim: int


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A whole decoder: embedding, layers, final norm and output head.

    `learned_positions` is (rows, offset) of a table: position p adds row p + offset to a token's
    embedding; with `embedding_norm` the sum is normalised. `final_norm` False leaves out the norm
    before the head, and `head_bias` adds a learned bias to the logits.

    With `spans_pass_windows`, tokens of one run that is seen in both directions see each other
    however short a layer's window is. `adapters` are the rank and scale of each low-rank adapter
    that a token's linear layers may use. The tokens `blank_ids` are looked up as token 0: they
    stand for media, and mean nothing where a model writes them itself. The last `own_rows` tokens
    are embedded by rows that the family gives (`Decoder.set_own_rows`), not by the table. Where
    the family chooses tokens by more than the logits, `open_stream` keeps the last stream readable.
    `vocab_parts` are the runs of rows that a checkpoint stores apart, of the table and of the head.
    """

    vocab_size: int
    hidden: int
    layers: tuple[LayerConfig, ...]
    max_positions: int
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    tied_head: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    extra_embeddings: int = 0
    spans_pass_windows: bool = False
    adapters: tuple[tuple[int, float], ...] = ()
    layer_inputs: LayerInputsConfig | None = None
    blank_ids: tuple[int, ...] = ()
    learned_positions: tuple[int, int] | None = None
    embedding_norm: bool = False
    final_norm: bool = True
    head_bias: bool = False
    own_rows: int = 0
    streams: StreamsConfig | None = None
    open_stream: bool = False
    vocab_parts: tuple[int, ...] = ()

    @property
    def rope_configs(self) -> set[RopeConfig]:
        """Every distinct rotary embedding among the layers."""
        ropes = (attention.rope for attention in self.attentions)
        return {rope for rope in ropes if rope is not None}

    @property
    def long_after(self) -> int | None:
        """The most tokens of a sequence that keeps the rope's short angles; None without such."""
        limits = (long_after(rope) for rope in self.rope_configs)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def attentions(self) -> list[AttentionConfig]:
        """The layers that keep keys and values of every token."""
        kinds = [layer.attention for layer in self.layers]
        return [kind for kind in kinds if isinstance(kind, AttentionConfig)]

    @property
    def cross_attentions(self) -> list[CrossAttentionConfig]:
        """The layers that keep keys and values of encoded media."""
        kinds = [layer.attention for layer in self.layers]
        return [kind for kind in kinds if isinstance(kind, CrossAttentionConfig)]

    @property
    def has_states(self) -> bool:
        """Whether some layers keep a state a sequence, which cannot be cut back to fewer tokens."""
        return any(isinstance(layer.attention, DeltaNetConfig) for layer in self.layers)
