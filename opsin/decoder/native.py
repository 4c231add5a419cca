"""The whole layer stack in one native call, for decoders that the CPU library covers."""

from __future__ import annotations

import dataclasses
import threading
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
from opsin.decoder.mlp import GatedMLP
from opsin.kernels.cpu.library import Library
from opsin.kernels.cpu.matrix import PackedMatrix
from opsin.kernels.cpu.stack import LayerSpec, LayerStack, NormWeights, StackStep
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
        self.cache: PagedCache | None = None
        self.lock = threading.Lock()  # several engines may share a model
        head = decoder.embedding if decoder.head is None else decoder.head
        self.stack = LayerStack(
            library,
            [self._spec(layer) for layer in decoder.layers],
            dim=config.hidden,
            final_norm=_norm(decoder.norm) or NormWeights(),
            head=_matrix(head),
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

    def run(self, step: Step, cache: PagedCache, angles: RotaryAngles) -> Tensor:
        """One step; the logits of `step.logit_rows`, (rows, vocab), float32."""
        batch = step.batch
        assert batch.unseen is None
        starts, contexts = batch.query_start, batch.context_lens
        places = [
            position
            for start, end, context in zip(starts, starts[1:], contexts, strict=False)
            for position in range(context - (end - start), context)
        ]
        # One tensor cut in pieces: each call of torch finds its code fallen out of the caches.
        facts = torch.tensor([*starts, *contexts, *places], dtype=torch.int32)
        query_start, num_keys, positions = facts.split((len(starts), len(contexts), len(places)))
        until = positions + 1 if batch.visible_until is None else batch.visible_until
        tables: dict[RopeConfig, tuple[Tensor, Tensor]] = angles.at(step.positions, step.long)
        tables_of = batch.block_tables
        if not cache.form.packed:
            # A block that is gone is masked, but its values must be numbers: the sequence's own.
            tables_of = torch.where(tables_of < 0, tables_of[:, :1], tables_of)
        native_step = StackStep(
            hidden=step.embeds.float().contiguous(),
            query_start=query_start,
            num_keys=num_keys,
            block_tables=tables_of,
            block_size=batch.block_size,
            slots=batch.slot_mapping,
            positions=positions,
            visible_until=until,
            rope=[tables[config] for config in self.ropes],
            logit_rows=step.logit_rows,
            adds=step.layer_adds,
            early_blocks=cache.layout.early_blocks,
            early_size=cache.layout.early_size,
            kept=batch.kept,
        )
        with self.lock:
            if self.cache is not cache:
                self.stack.bind(cache.keys, cache.values)
                self.cache = cache
            return self.stack.run(native_step)


def _matrix(module: Linear | Embedding) -> PackedMatrix:
    assert isinstance(module.packed, PackedMatrix), "the stack is built from packed weights"
    return module.packed


def _norm(module: nn.Module) -> NormWeights | None:
    if isinstance(module, RMSNorm):
        return NormWeights(module.weight)
    if isinstance(module, LayerNorm):
        return NormWeights(module.weight, module.bias)
    return None
