"""A stack of decoder layers that one native call runs, whatever the number of layers."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import TypeAlias

import torch
from torch import Tensor

from opsin.kernels.cpu import abi
from opsin.kernels.cpu.library import Library, pointer
from opsin.kernels.cpu.matrix import PackedMatrix
from opsin.kernels.packed_rows import CacheRows, PackedRows

Floats: TypeAlias = Tensor | array  # float32


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


@dataclass(frozen=True, slots=True)
class StackStep:
    """The tokens of one step, sequence after sequence.

    hidden (tokens, dim) float32, replaced by the last layer's output; query_start (sequences + 1);
    num_keys (sequences,) once this step's keys are written; block_tables: the blocks of each
    sequence; slots (tokens,) cache slots to write; positions (tokens,) within the sequence;
    visible_until (tokens,) one past the last key seen; rope: cos and sin of each table, (tokens,
    rotary_dim / 2) float32; adds: layer to (rows, values), values added to those rows after it;
    logit_rows: rows whose logits are wanted. With quantised caches, a sequence's first early_blocks
    blocks hold early_size plain rows each, a slot below zero is slot -1 - slot of the quantised
    ones, and a block below zero is one that is gone. kept (first, last): the keys that a token
    sees, see `AttentionBatch`.

    Integers are plain ones: to make a tensor of each takes longer than a small model's layer.
    """

    hidden: Tensor
    query_start: Sequence[int]
    num_keys: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    block_size: int
    slots: Sequence[int]
    positions: Sequence[int]
    visible_until: Sequence[int]
    rope: Sequence[tuple[Floats, Floats]]
    logit_rows: Sequence[int]
    adds: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    early_blocks: int = 0
    early_size: int = 1
    kept: tuple[int, int] | None = None

    def packed_ints(self) -> tuple[array[int], list[int], int]:
        """query_start, num_keys, positions, visible_until, logit_rows and block_tables (sequences,
        width) in one array; where each begins in it; width.
        """
        ints, starts = array("i"), []
        for values in (
            self.query_start,
            self.num_keys,
            self.positions,
            self.visible_until,
            self.logit_rows,
        ):
            starts.append(len(ints))
            ints.extend(values)
        starts.append(len(ints))
        width = max(map(len, self.block_tables))
        for table in self.block_tables:
            ints.extend(table)
            ints.extend(repeat(0, width - len(table)))
        return ints, starts, width


def floats_at(values: Floats) -> int:
    """Where contiguous float32 values lie."""
    if isinstance(values, array):
        return values.buffer_info()[0]
    if values.dtype != torch.float32 or not values.is_contiguous():
        raise ValueError("angles must be contiguous float32")
    return values.data_ptr()


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
        norm_eps: float,
        layer_norm: bool = False,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
    ) -> None:
        self.library = library
        self.specs = list(layers)
        self.dim = dim
        self.head = head
        self._kept: list[Tensor] = []
        self._layers = (abi.Layer * len(self.specs))(*(self._layer(spec) for spec in self.specs))
        self._stack = abi.Stack(
            layers=ctypes.addressof(self._layers),
            final_norm=self._keep(final_norm.weight),
            final_norm_bias=self._keep(final_norm.bias),
            head=None if head is None else head.handle,
            num_layers=len(self.specs),
            dim=dim,
            layer_norm=layer_norm,
            norm_eps=norm_eps,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap or 0.0,
        )

    def bind(self, keys: Sequence[CacheRows], values: Sequence[CacheRows]) -> None:
        """Use these caches, one of each a layer: (blocks, kv_heads, block_size, head_dim) bfloat16,
        or quantised rows (slots, kv_heads, head_dim).
        """
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

    def run(self, step: StackStep, when_ready: Callable[[], None] = lambda: None) -> Tensor:
        """Run all layers over the step; logits (logit_rows, vocabulary) float32.

        `when_ready` is called right before the layers.
        """
        hidden = step.hidden
        if hidden.dtype != torch.float32 or not hidden.is_contiguous():
            raise ValueError("hidden must be contiguous float32")
        ints, starts, blocks = step.packed_ints()
        where = [ints.buffer_info()[0] + start * ints.itemsize for start in starts]
        slots = array("q", step.slots)
        tables = ctypes.c_void_p * max(1, len(step.rope))
        cos, sin = (tables(*(floats_at(pair[i]) for pair in step.rope)) for i in (0, 1))
        added = [
            (layer, rows.to(torch.int64).contiguous(), values.float().contiguous())
            for layer, (rows, values) in step.adds.items()
        ]
        adds = (abi.RowAdd * max(1, len(added)))(
            *(abi.RowAdd(pointer(r), pointer(v), layer, len(r)) for layer, r, v in added)
        )
        rows = len(step.logit_rows) if self.head is not None else 0
        logits = torch.empty(rows, self.head.n if self.head is not None else 0)
        call = abi.Step(
            hidden=pointer(hidden), query_start=where[0], num_keys=where[1], positions=where[2],
            visible_until=where[3], logit_rows=where[4], block_tables=where[5],
            slots=slots.buffer_info()[0],
            cos=ctypes.addressof(cos), sin=ctypes.addressof(sin), adds=ctypes.addressof(adds),
            logits=pointer(logits), tokens=hidden.shape[0], sequences=len(step.num_keys),
            max_blocks=blocks,
            block_size=step.block_size, first_layer=0, last_layer=len(self.specs),
            num_logits=rows, num_adds=len(added), early_blocks=step.early_blocks,
            early_size=step.early_size, kept_first=step.kept[0] if step.kept else 0,
            kept_last=step.kept[1] if step.kept else 0,
        )  # fmt: skip
        when_ready()
        code = self.library.handle.opsin_step(ctypes.byref(self._stack), ctypes.byref(call))
        self.library.check(code, "step")
        return logits

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
