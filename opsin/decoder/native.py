"""The whole layer stack in one native call, for decoders that the CPU library covers."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opsin.decoder.attention import Attention
from opsin.decoder.cache import PagedCache
from opsin.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    MLPConfig,
    ParallelLayerConfig,
)
from opsin.decoder.decoder import Decoder, Layer, Step
from opsin.decoder.layout import HOLE
from opsin.decoder.mlp import GatedMLP
from opsin.kernels.cpu.library import Library
from opsin.kernels.cpu.matrix import PackedMatrix
from opsin.kernels.cpu.stack import LayerSpec, LayerStack, NormWeights, RopeTables, StackStep
from opsin.nn.linear import Embedding, Linear
from opsin.nn.norm import LayerNorm, RMSNorm
from opsin.nn.rope import RopeConfig, RotaryAngles

# What a config may state for the native stack to cover it; every other field is at its default.
DECODER_FIELDS = frozenset(
    (
        "vocab_size",
        "extra_embeddings",
        "hidden",
        "layers",
        "max_positions",
        "norm",
        "norm_eps",
        "tied_head",
        "embedding_scale",
        "logit_scale",
        "logit_soft_cap",
    )
)
LAYER_FIELDS = frozenset(("attention", "mlp", "post_norms", "residual_scale"))
ATTENTION_FIELDS = frozenset(
    (
        "heads",
        "kv_heads",
        "head_dim",
        "rope",
        "qkv_bias",
        "out_bias",
        "qk_norm",
        "window",
        "scale",
        "soft_cap",
    )
)
ROWS = 16  # rows of one packed block
LOOKED_UP = 8192  # positions whose angles are kept: a few MB


def why_not(config: DecoderConfig) -> str:
    """Why the native stack does not cover a decoder, as a clause; empty if it does."""
    unknown = _stated(config, DECODER_FIELDS)
    for layer in config.layers:
        if layer.sum_norms:
            return "it normalises the stream after each block"
        if isinstance(layer, ParallelLayerConfig):
            return "its blocks run side by side"
        if not isinstance(layer.attention, AttentionConfig):
            return f"it has layers of kind {type(layer.attention).__name__}"
        if not isinstance(layer.mlp, MLPConfig):
            return f"it has layers of kind {type(layer.mlp).__name__}"
        unknown |= _stated(layer, LAYER_FIELDS) | _stated(layer.attention, ATTENTION_FIELDS)
        if layer.mlp.hidden % ROWS:
            return f"{layer.mlp.hidden} features are no multiple of {ROWS}"
        if layer.attention.qk_norm == "layer":
            return "queries and keys have layer norms"
    return f"it has {', '.join(sorted(unknown))}" if unknown else ""


def _stated(config: Any, known: frozenset[str]) -> set[str]:
    """Fields outside `known` that are not at their default."""
    values = dataclasses.asdict(config)
    fields = dataclasses.fields(config)
    return {f.name for f in fields if f.name not in known and values[f.name] != f.default}


def gate_up_layers(decoder: Decoder) -> frozenset[nn.Module]:
    """The layers whose two outputs alternate by sixteen rows in the native stack."""
    return frozenset(
        layer.mlp.gate_up
        for layer in decoder.layers
        if isinstance(layer, Layer) and isinstance(layer.mlp, GatedMLP)
    )


class NativeStack:
    """A decoder's packed layers, bound to whichever cache a step comes with."""

    def __init__(self, library: Library, decoder: Decoder) -> None:
        config = decoder.config
        self.ropes = sorted(config.rope_configs, key=repr)
        self.axes = 1 + max((axis for config in self.ropes for axis in config.axes), default=0)
        self.turns: RopeTables | None = None  # see turned
        self.embedding = decoder.embedding
        self.cache: PagedCache | None = None
        self.lock = threading.Lock()  # several engines may share a model
        head = decoder.embedding if decoder.head is None else decoder.head
        self.stack = LayerStack(
            library,
            [self._spec(layer) for layer in decoder.layers],
            dim=config.hidden,
            final_norm=_norm(decoder.norm) or NormWeights(),
            head=_matrix(head),
            embedding=table_of(library, decoder.embedding),
            embedding_scale=decoder.embedding.scale,
            norm_eps=config.norm_eps,
            layer_norm=config.norm == "layer",
            logit_scale=config.logit_scale,
            logit_softcap=config.logit_soft_cap,
        )

    def _spec(self, layer: nn.Module) -> LayerSpec:
        assert isinstance(layer, Layer)
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention, Attention)
        assert isinstance(mlp, GatedMLP)
        facts, rope = attention.config, attention.config.rope
        return LayerSpec(
            qkv=_matrix(attention.qkv),
            out=_matrix(attention.out),
            gate_up=_matrix(mlp.gate_up),
            down=_matrix(mlp.down),
            heads=facts.heads,
            kv_heads=facts.kv_heads,
            head_dim=facts.head_dim,
            attention_norm=_norm(layer.attention_norm),
            mlp_norm=_norm(layer.mlp_norm),
            query_norm=None if attention.q_norm is None else attention.q_norm.weight,
            key_norm=None if attention.k_norm is None else attention.k_norm.weight,
            after_attention_norm=_norm(layer.attention_post_norm),
            after_mlp_norm=_norm(layer.mlp_post_norm),
            rope=None if rope is None else self.ropes.index(rope),
            rotary_dim=0 if rope is None else rope.dim,
            rope_interleaved=rope is not None and rope.pairs == "adjacent",
            window=facts.window,
            activation=mlp.activation,
            attention_scale=attention.scale,
            attention_softcap=facts.soft_cap,
            residual_scale=layer.residual_scale,
        )

    @property
    def takes_ids(self) -> bool:
        """Whether steps may come as token ids alone."""
        return self.stack.embedding is not None

    def embed(self, token_ids: list[int]) -> Tensor:
        """Embeddings (tokens, hidden), float32."""
        table = self.embedding
        if not isinstance(table.packed, PackedMatrix):
            embeds: Tensor = table(torch.tensor(token_ids))
            return embeds.float()
        rows = table.packed.rows(token_ids, torch.float32)
        return rows if table.scale == 1.0 else rows.mul_(table.scale)

    def run(self, step: Step, cache: PagedCache, angles: RotaryAngles) -> Tensor:
        """One step; the logits of `step.logit_rows`, (rows, vocab), float32."""
        batch = step.batch
        assert batch.unseen is None
        rope, _ = self.turned(step.positions, angles, step.long)
        until = None if batch.visible_until is None else batch.visible_until.tolist()
        ready = StackStep(
            hidden=step.embeds.float().contiguous(),
            query_start=batch.query_start,
            num_keys=batch.context_lens,
            block_tables=batch.block_tables.tolist(),
            rope=rope,
            logit_rows=step.logit_rows.tolist(),
            visible_until=until,
            kept=batch.kept,
            adds=step.layer_adds,
        )
        logits, _ = self.compute(ready, cache)
        assert logits is not None
        return logits

    def compute(
        self, step: StackStep, cache: PagedCache, when_ready: Callable[[], None] = lambda: None
    ) -> tuple[Tensor | None, list[int]]:
        """What `LayerStack.run` does, over a cache."""
        if step.kept is not None and not cache.form.packed:
            step = dataclasses.replace(step, block_tables=[_readable(t) for t in step.block_tables])
        with self.lock:
            if self.cache is not cache:
                layout = cache.layout
                early = (layout.early_blocks, layout.early_size)
                self.stack.bind(cache.keys, cache.values, layout.size, *early)
                self.cache = cache
            return self.stack.run(step, when_ready)

    def turned(
        self, positions: Tensor | list[int], angles: RotaryAngles, long: Tensor | None = None
    ) -> tuple[RopeTables, list[int] | None]:
        """Cos and sin of each rope, and each token's row among them, None for one a token.

        Those of generated tokens (a list, all axes being the same) are looked up: after the layers
        torch's code has fallen out of the processor's caches.
        """
        if isinstance(positions, list):
            if long is None and max(positions) < LOOKED_UP:
                if self.turns is None:
                    places = torch.arange(LOOKED_UP).expand(self.axes, -1)
                    self.turns = self._tables(angles.at(places))
                return self.turns, positions
            positions = torch.tensor(positions).expand(self.axes, -1)
        return self._tables(angles.at(positions, long)), None

    def _tables(self, found: dict[RopeConfig, tuple[Tensor, Tensor]]) -> RopeTables:
        parts = (found[each] for each in self.ropes)
        return RopeTables([(cos.contiguous(), sin.contiguous()) for cos, sin in parts])


def _readable(table: Sequence[int]) -> list[int]:
    """A block table to read by. A block that is gone is masked, but where it is not quantised its
    values must be numbers: the sequence's own.
    """
    return [table[0] if block == HOLE else block for block in table]


def _matrix(module: Linear | Embedding) -> PackedMatrix:
    assert isinstance(module.packed, PackedMatrix), "the stack is built from packed weights"
    return module.packed


def table_of(library: Library, embedding: Embedding) -> PackedMatrix | None:
    """An embedding as the stack reads it, where it lies; None where it cannot be read as it is."""
    if isinstance(embedding.packed, PackedMatrix):
        return embedding.packed
    weight = embedding.weight
    if embedding.packed is not None or weight.dtype != torch.bfloat16 or embedding.scale != 1.0:
        return None
    table = PackedMatrix(library, "bf16", *weight.shape)
    return table if table.map(weight) else None


def _norm(module: nn.Module) -> NormWeights | None:
    if isinstance(module, RMSNorm):
        return NormWeights(module.weight)
    if isinstance(module, LayerNorm):
        return NormWeights(module.weight, module.bias)
    return None
