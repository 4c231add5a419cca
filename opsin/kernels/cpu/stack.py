"""A stack of decoder layers that one native call runs, whatever the number of layers."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from opsin.kernels.cpu import abi
from opsin.kernels.cpu.library import Library, pointer
from opsin.kernels.cpu.matrix import PackedMatrix
from opsin.kernels.packed_rows import CacheRows, PackedRows


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A norm's factors and offsets, (dim,), any float type; a missing one does nothing."""

    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer: packed weights and facts.

    `qkv` holds the rows of all query heads, then key heads, then value heads. With `gated`,
    `gate_up` has gate and up rows alternating by sixteen (`PackedMatrix.fill` with spread 2). A
    norm of None is not there. `rope` indexes the step's tables; None: no positions.
    """

    qkv: PackedMatrix
    out: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix
    heads: int
    kv_heads: int
    head_dim: int
    attention_norm: NormWeights | None
    mlp_norm: NormWeights | None
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    after_attention_norm: NormWeights | None = None
    after_mlp_norm: NormWeights | None = None
    rope: int | None = 0
    rotary_dim: int = 0
    rope_interleaved: bool = False
    window: int | None = None
    gated: bool = True
    activation: str = "silu"
    attention_scale: float = 1.0
    attention_softcap: float | None = None
    residual_scale: float = 1.0
    sinks: Tensor | None = None


class RopeTables:
    """Cos and sin of each rope, (rows, rotary_dim / 2), float32, where a step finds them."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        if any(x.dtype != torch.float32 or not x.is_contiguous() for pair in pairs for x in pair):
            raise ValueError("angles must be contiguous float32")
        self.pairs = list(pairs)
        addresses = ctypes.c_void_p * max(1, len(pairs))
        self._cos = addresses(*(cos.data_ptr() for cos, _ in pairs))
        self._sin = addresses(*(sin.data_ptr() for _, sin in pairs))
        self.cos, self.sin = ctypes.addressof(self._cos), ctypes.addressof(self._sin)


@dataclass(slots=True)  # one made in every step: if it were frozen, that took twice as long
class StackStep:
    """The tokens of one step, sequence after sequence.

    query_start (sequences + 1); num_keys (sequences,) once this step's keys are written;
    block_tables: the blocks of each sequence, below zero where one is gone from a quantised cache;
    rope_rows (tokens,) their rows in the tables of `rope`, None: one a token; logit_rows: rows
    whose logits are wanted, or, without `wants_logits`, only where the largest of them are. The
    tokens are the embedding's rows token_ids (tokens,), or else `hidden` (tokens, dim) float32,
    which the last layer's output replaces. visible_until (tokens,) one past the last key seen, None
    for a token's own; adds: layer to (rows, values), values added to those rows after it; kept
    (first, last): the keys that a token sees, see `AttentionBatch`.

    Integers are plain ones: to make a tensor of each takes longer than a small model's layer.
    """

    query_start: Sequence[int]
    num_keys: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    rope: RopeTables
    logit_rows: Sequence[int]
    token_ids: Sequence[int] = ()
    hidden: Tensor | None = None
    rope_rows: Sequence[int] | None = None
    visible_until: Sequence[int] | None = None
    adds: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    kept: tuple[int, int] | None = None
    wants_logits: bool = True


class LayerStack:
    """Layers, final norm and head behind one call; call `bind` with the cache before `run`."""

    def __init__(
        self,
        library: Library,
        layers: Sequence[LayerSpec],
        *,
        dim: int,
        final_norm: NormWeights,
        head: PackedMatrix | None,
        embedding: PackedMatrix | None = None,
        embedding_scale: float = 1.0,
        norm_eps: float,
        layer_norm: bool = False,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
    ) -> None:
        self.library = library
        self.specs = list(layers)
        self.dim = dim
        self.head = head
        self.embedding = embedding
        self._kept: list[Tensor] = []
        self._layers = (abi.Layer * len(self.specs))(*(self._layer(spec) for spec in self.specs))
        self._stack = abi.Stack(
            layers=ctypes.addressof(self._layers),
            final_norm=self._keep(final_norm.weight),
            final_norm_bias=self._keep(final_norm.bias),
            head=None if head is None else head.handle,
            embedding=None if embedding is None else embedding.handle,
            num_layers=len(self.specs),
            dim=dim,
            layer_norm=layer_norm,
            norm_eps=norm_eps,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap or 0.0,
            embedding_scale=embedding_scale,
        )
        self._call = abi.Step(last_layer=len(self.specs))  # what steps differ in is set by each
        self._at = ctypes.addressof(self._stack)
        self._call_at = ctypes.addressof(self._call)

    def bind(
        self,
        keys: Sequence[CacheRows],
        values: Sequence[CacheRows],
        block_size: int,
        early_blocks: int = 0,
        early_size: int = 1,
    ) -> None:
        """Use these caches, one of each a layer: (blocks, kv_heads, block_size, head_dim) bfloat16,
        or quantised rows (slots, kv_heads, head_dim), of which a sequence's first early_blocks
        blocks hold early_size plain ones each.
        """
        self._call.block_size = block_size
        self._call.early_blocks, self._call.early_size = early_blocks, early_size
        for layer, spec, key, value in zip(self._layers, self.specs, keys, values, strict=True):
            layer.kv_bits, layer.kv_groups = 16, 0
            layer.key_cache, layer.key_scales = self._bound(layer, spec, key)
            layer.value_cache, layer.value_scales = self._bound(layer, spec, value)
        self._caches = (list(keys), list(values))

    @staticmethod
    def _bound(layer: abi.Layer, spec: LayerSpec, cache: CacheRows) -> tuple[int, int | None]:
        """The addresses of a cache's rows and of its scales, if it has any."""
        plain = cache.plain if isinstance(cache, PackedRows) else cache
        heads = plain.shape[1] if plain.ndim == (3 if isinstance(cache, PackedRows) else 4) else 0
        if plain.dtype != torch.bfloat16 or not plain.is_contiguous():
            raise ValueError("the native stack keeps keys and values as bfloat16 rows")
        if (heads, plain.shape[-1]) != (spec.kv_heads, spec.head_dim):
            raise ValueError(f"a cache of {tuple(plain.shape)} does not fit the layer")
        if not isinstance(cache, PackedRows):
            return plain.data_ptr(), None
        layer.kv_bits, layer.kv_groups = cache.bits, cache.scales.shape[2]
        return cache.codes.data_ptr(), cache.scales.data_ptr()

    def run(
        self, step: StackStep, when_ready: Callable[[], None] = lambda: None
    ) -> tuple[Tensor | None, list[int]]:
        """Run all layers over the step; logits (logit_rows, vocabulary) float32, if they are
        wanted, and the first largest of each row, a NaN being the largest of all.

        `when_ready` is called right before the layers.
        """
        call, hidden, tokens = self._call, step.hidden, step.query_start[-1]
        if hidden is not None and (hidden.dtype != torch.float32 or not hidden.is_contiguous()):
            raise ValueError("hidden must be contiguous float32")
        if len(step.token_ids if hidden is None else hidden) != tokens:
            raise ValueError(f"a step of {tokens} tokens has others")
        rows = 0 if self.head is None else len(step.logit_rows)
        columns = 0 if self.head is None else self.head.n
        logits = torch.empty(rows, columns) if step.wants_logits else None
        tables, call.max_blocks = _rectangle(step.block_tables)
        ints, at = _side_by_side(
            step.query_start, step.num_keys, step.logit_rows, tables, step.token_ids,
            step.rope_rows or (), step.visible_until or (), [0] * rows,
        )  # fmt: skip
        call.query_start, call.num_keys, call.logit_rows, call.block_tables = at[:4]
        call.token_ids, call.likeliest = at[4], at[7]
        call.rope_rows = None if step.rope_rows is None else at[5]
        call.visible_until = None if step.visible_until is None else at[6]
        call.hidden, call.logits = pointer(hidden), pointer(logits)
        call.cos, call.sin = step.rope.cos, step.rope.sin
        call.tokens, call.sequences = tokens, len(step.num_keys)
        call.num_logits = rows
        call.kept_first, call.kept_last = step.kept or (0, 0)
        call.num_adds = len(step.adds)
        if step.adds:
            added = [
                (layer, index.to(torch.int64).contiguous(), values.float().contiguous())
                for layer, (index, values) in step.adds.items()
            ]
            adds = (abi.RowAdd * len(added))(
                *(abi.RowAdd(pointer(r), pointer(v), layer, len(r)) for layer, r, v in added)
            )
            call.adds = ctypes.addressof(adds)
        when_ready()
        self.library.check(self.library.handle.opsin_step(self._at, self._call_at), "step")
        return logits, ints[len(ints) - rows :].tolist()

    def _keep(self, weight: Tensor | None) -> int | None:
        """The address of a float32 copy that lives as long as the stack."""
        if weight is None:
            return None
        self._kept.append(weight.detach().float().contiguous().clone())
        return self._kept[-1].data_ptr()

    def _layer(self, spec: LayerSpec) -> abi.Layer:
        norms = {
            "attention_norm": spec.attention_norm,
            "mlp_norm": spec.mlp_norm,
            "after_attention_norm": spec.after_attention_norm,
            "after_mlp_norm": spec.after_mlp_norm,
        }
        layer = abi.Layer(
            qkv=spec.qkv.handle, out=spec.out.handle, gate_up=spec.gate_up.handle,
            down=spec.down.handle, query_norm=self._keep(spec.query_norm),
            key_norm=self._keep(spec.key_norm), sinks=self._keep(spec.sinks),
            heads=spec.heads, kv_heads=spec.kv_heads, head_dim=spec.head_dim,
            intermediate=spec.down.k, rope=-1 if spec.rope is None else spec.rope,
            rotary_dim=spec.rotary_dim, rope_interleaved=spec.rope_interleaved,
            window=spec.window or 0, gated=spec.gated,
            activation=abi.ACTIVATIONS[spec.activation], attention_scale=spec.attention_scale,
            attention_softcap=spec.attention_softcap or 0.0, residual_scale=spec.residual_scale,
        )  # fmt: skip
        for name, norm in norms.items():
            if norm is None:
                continue
            if norm.weight is None:
                raise ValueError("a norm of the native stack has a weight")
            setattr(layer, name, self._keep(norm.weight))
            if norm.bias is not None:
                if name.startswith("after"):
                    raise ValueError("a norm behind a block has no bias in the native stack")
                setattr(layer, f"{name}_bias", self._keep(norm.bias))
        return layer


def _rectangle(tables: Sequence[Sequence[int]]) -> tuple[list[int], int]:
    """Block tables as (sequences, width), and the width."""
    width = max(map(len, tables))
    blocks: list[int] = []
    for table in tables:
        blocks += table
        blocks += [0] * (width - len(table))
    return blocks, width


def _side_by_side(*parts: Sequence[int]) -> tuple[array[int], list[int]]:
    """All the integers in one array, and the address at which each part begins."""
    ints = array("i", list(chain(*parts)))
    place, places = ints.buffer_info()[0], []
    for part in parts:
        places.append(place)
        place += len(part) * ints.itemsize
    return ints, places
