"""The whole layer stack in one native call, for decoders that the CPU library covers."""

from __future__ import annotations

import dataclasses
import threading
from array import array
from collections.abc import Callable
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
from opsin.decoder.decoder import Decoder, Layer, NativeStep, Step
from opsin.decoder.layout import HOLE
from opsin.decoder.mlp import GatedMLP
from opsin.kernels.cpu.library import Library
from opsin.kernels.cpu.matrix import PackedMatrix
from opsin.kernels.cpu.stack import Floats, LayerSpec, LayerStack, NormWeights, StackStep
from opsin.nn.linear import Embedding, Linear
from opsin.nn.norm import LayerNorm, RMSNorm
from opsin.nn.rope import RotaryAngles

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
        self.turns: list[tuple[memoryview, memoryview]] = []  # of each rope, see turned
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
        return self.compute(
            NativeStep(
                embeds=step.embeds,
                positions=step.positions,
                query_start=batch.query_start,
                context_lens=batch.context_lens,
                block_tables=batch.block_tables.tolist(),
                slot_mapping=batch.slot_mapping.tolist(),
                logit_rows=step.logit_rows.tolist(),
                visible_until=batch.visible_until,
                kept=batch.kept,
                layer_adds=step.layer_adds,
                long=step.long,
            ),
            cache,
            angles,
        )

    def compute(
        self,
        step: NativeStep,
        cache: PagedCache,
        angles: RotaryAngles,
        when_ready: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """The same, of plain integers; `when_ready` is called as Python is about to be left."""
        starts, contexts = step.query_start, step.context_lens
        places = [
            position
            for start, end, context in zip(starts, starts[1:], contexts, strict=False)
            for position in range(context - (end - start), context)
        ]
        seen = [place + 1 for place in places]
        native_step = StackStep(
            hidden=step.embeds.float().contiguous(),
            query_start=starts,
            num_keys=contexts,
            block_tables=[_readable(table, cache) for table in step.block_tables],
            block_size=cache.block_size,
            slots=step.slot_mapping,
            positions=places,
            visible_until=seen if step.visible_until is None else step.visible_until.tolist(),
            rope=self.turned(step.positions, angles, step.long),
            logit_rows=step.logit_rows,
            adds=step.layer_adds,
            early_blocks=cache.layout.early_blocks,
            early_size=cache.layout.early_size,
            kept=step.kept,
        )
        with self.lock:
            if self.cache is not cache:
                self.stack.bind(cache.keys, cache.values)
                self.cache = cache
            return self.stack.run(native_step, when_ready)

    def turned(
        self, positions: Tensor | list[int], angles: RotaryAngles, long: Tensor | None = None
    ) -> list[tuple[Floats, Floats]]:
        """Cos and sin of each rope, (tokens, dim / 2), float32. Those of generated tokens are
        looked up: after the layers torch's code has fallen out of the processor's caches.
        """
        if isinstance(positions, list):
            if long is None and max(positions) < LOOKED_UP:
                if not self.turns:
                    self.turns = self._turns(angles)
                return [(_rows(cos, positions), _rows(sin, positions)) for cos, sin in self.turns]
            positions = torch.tensor(positions).expand(self.axes, -1)
        found = angles.at(positions, long)
        return [(found[each][0].contiguous(), found[each][1].contiguous()) for each in self.ropes]

    def _turns(self, angles: RotaryAngles) -> list[tuple[memoryview, memoryview]]:
        found = angles.at(torch.arange(LOOKED_UP).expand(self.axes, -1))
        return [(_bytes(found[each][0]), _bytes(found[each][1])) for each in self.ropes]


def _bytes(table: Tensor) -> memoryview:
    return table.contiguous().numpy().data.cast("B")


def _rows(table: memoryview, rows: list[int]) -> array[float]:
    """Rows of a table (LOOKED_UP, dim) of float32, one after another."""
    out, size = array("f"), len(table) // LOOKED_UP
    for row in rows:
        out.frombytes(table[row * size : (row + 1) * size])
    return out


def _readable(table: list[int], cache: PagedCache) -> list[int]:
    """A block table to read by. A block that is gone is masked, but where it is not quantised its
    values must be numbers: the sequence's own.
    """
    if cache.form.packed or HOLE not in table:
        return table
    return [table[0] if block == HOLE else block for block in table]


def _matrix(module: Linear | Embedding) -> PackedMatrix:
    assert isinstance(module.packed, PackedMatrix), "the stack is built from packed weights"
    return module.packed


def _norm(module: nn.Module) -> NormWeights | None:
    if isinstance(module, RMSNorm):
        return NormWeights(module.weight)
    if isinstance(module, LayerNorm):
        return NormWeights(module.weight, module.bias)
    return None
