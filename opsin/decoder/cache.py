"""What layers remember: token slots handed out in blocks, and states handed out one a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from opsin.decoder.config import (
    AttentionConfig,
    CrossAttentionConfig,
    DecoderConfig,
    DeltaNetConfig,
    SharedAttentionConfig,
)
from opsin.decoder.layout import HOLE, BlockLayout
from opsin.errors import InputError
from opsin.kernels import CacheRows, PackedRows

KV_BITS = (16, 8, 4)
KV_GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """How keys and values of tokens are kept: 16 bits, the model's own type, or quantised.

    At 8 and 4 bits, every `group` values of a head, or all if it has fewer, share a scale and a
    bias. The first `start` tokens of a sequence, up to the next whole block, stay unquantised.
    """

    bits: int = 16
    group: int = 64
    start: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kv_bits", self.bits, KV_BITS),
            ("kv_group_size", self.group, KV_GROUPS),
        ):
            if value not in known:
                raise InputError(
                    f"{name} cannot be {value}",
                    remedy=f"Use one of {', '.join(map(str, known))}",
                    param=name,
                )

    @property
    def packed(self) -> bool:
        """Whether anything is quantised."""
        return self.bits != 16

    def groups(self, head_dim: int) -> int:
        """Groups of one head's row."""
        return head_dim // min(self.group, head_dim)

    def why_not(self, config: DecoderConfig) -> str:
        """Why a decoder's keys and values cannot be kept so, as a clause; empty if they can."""
        if not self.packed:
            return ""
        if not config.attentions:
            return "no layer keeps keys and values of tokens"
        dims = {attention.head_dim for attention in config.attentions}
        unfit = next((dim for dim in sorted(dims) if dim % min(self.group, dim)), None)
        return "" if unfit is None else f"its heads have {unfit} values"

    def layout(self, block_size: int, dtype: torch.dtype) -> BlockLayout:
        """Where tokens lie in blocks of `block_size`, kept so by a model of this type."""
        if not self.packed:
            return BlockLayout(block_size)
        early_size, rest = divmod(block_size * self.bits, 8 * dtype.itemsize)
        if rest:
            raise InputError(
                f"block_size cannot be {block_size} with kv_bits {self.bits}",
                remedy="Use a multiple of 8",
                param="block_size",
            )
        return BlockLayout(block_size, -(-self.start // early_size), early_size, packed=True)

    def row_bytes(self, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one head's keys, or values, of one token that is quantised if any is."""
        if not self.packed:
            return head_dim * dtype.itemsize
        return head_dim * self.bits // 8 + 2 * self.groups(head_dim) * dtype.itemsize


class PagedCache:
    """What every layer remembers of every sequence.

    A softmax attention layer has keys and values, (slots, kv_heads, head_dim), where slot = block *
    size + offset, and the same rows are both where its values are in its keys; so has a
    cross-attention layer, in blocks of their own, for the encoded media. With `by_head` those of
    tokens, where they are not quantised, are (blocks, kv_heads, size, head_dim), as the native
    stack keeps them: what one head reads lies together. A recurrent layer has
    states, tensors whose first axis is a sequence's state slot
    (for a delta network: the convolution's inputs (state slots, kernel - 1, channels) and the
    memory (state slots, heads, key_dim, value_dim), float32). The lists run over all layers and are
    empty where the layer is of another kind.

    Where `form` quantises, keys and values of tokens are `PackedRows`; those of encoded media and
    all states stay as they are. Which blocks and state slots belong to which sequence is the
    scheduler's business. Memory is reserved at once but, on a CPU, only touched as it is used.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_state_slots: int = 1,
        num_source_blocks: int = 0,
        form: CacheFormat = CacheFormat(),
        by_head: bool = False,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.form = form
        self.layout = form.layout(block_size, dtype)
        self.keys: list[CacheRows] = []
        self.values: list[CacheRows] = []
        self.states: list[tuple[Tensor, ...]] = []
        for layer in config.layers:
            shape: tuple[int, ...] = (0,)
            if isinstance(layer.attention, SharedAttentionConfig):
                source = layer.attention.shared_from
                if source is not None:
                    self.keys.append(self.keys[source])
                    self.values.append(self.values[source])
                    self.states.append(())
                    continue
            if isinstance(layer.attention, AttentionConfig | CrossAttentionConfig):
                kind = layer.attention
                own = isinstance(kind, AttentionConfig)
                blocks = num_blocks if own else num_source_blocks
                shape = (blocks * block_size, kind.kv_heads, kind.head_dim)
                if by_head and own and not form.packed:
                    shape = (blocks, kind.kv_heads, block_size, kind.head_dim)
            within = isinstance(layer.attention, AttentionConfig) and layer.attention.values_in_keys
            for rows in (self.keys, self.values):
                if within and rows is self.values:
                    rows.append(self.keys[-1])
                elif form.packed and isinstance(layer.attention, AttentionConfig):
                    rows.append(_packed_rows(form, shape, dtype, device))
                else:
                    rows.append(torch.empty(shape, dtype=dtype, device=device))
            states: list[Tensor] = []
            if isinstance(layer.attention, DeltaNetConfig):
                states = [
                    torch.empty((num_state_slots, *shape), dtype=kind, device=device)
                    for shape, kind in _state_shapes(layer.attention, dtype)
                ]
            self.states.append(tuple(states))

    def clear_states(self, slots: Sequence[int]) -> None:
        """Forget what lies in these state slots: a sequence starts there."""
        for states in self.states:
            for state in states:
                for slot in slots:
                    state[slot].zero_()

    def free(self) -> None:
        """Let all memory go."""
        self.keys.clear()
        self.values.clear()
        self.states.clear()

    @staticmethod
    def bytes_per_token(
        config: DecoderConfig,
        dtype: torch.dtype,
        form: CacheFormat = CacheFormat(),
    ) -> int:
        """Cache memory that one token, quantised if any is, takes over all layers."""
        own = [a for a in config.attentions if not _reads_another(a)]
        return sum(_rows_per_token(a) * form.row_bytes(a.head_dim, dtype) for a in own)

    @staticmethod
    def bytes_per_source_token(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Cache memory that one row of encoded media takes over all layers."""
        return sum(2 * a.kv_heads * a.head_dim for a in config.cross_attentions) * dtype.itemsize

    @staticmethod
    def bytes_per_state_slot(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Cache memory that one sequence's states take over all layers."""
        return sum(
            math.prod(shape) * kind.itemsize
            for layer in config.layers
            if isinstance(layer.attention, DeltaNetConfig)
            for shape, kind in _state_shapes(layer.attention, dtype)
        )


def cache_slots(
    table: list[int], count: int, block_size: int, device: torch.device
) -> slice | Tensor:
    """Where the first `count` keys of a block table lie: a slice if its blocks are neighbours."""
    used = -(-count // block_size)
    if all(block == table[0] + i for i, block in enumerate(table[:used])):
        start = table[0] * block_size if used else 0
        return slice(start, start + count)
    return _within(table[:used], block_size, device)[:count]


@dataclass(frozen=True, slots=True)
class SequenceSlots:
    """Where a sequence's keys lie: those in early blocks, quantised ones behind them, and the
    positions of all where some are gone.
    """

    early: slice | Tensor
    late: slice | Tensor
    positions: Tensor | None


def sequence_slots(
    table: list[int], count: int, layout: BlockLayout, device: torch.device
) -> SequenceSlots:
    """Where the first `count` keys of a sequence lie, those left out whose blocks are gone."""
    used = layout.blocks_for(count)
    early, late = table[: layout.early_blocks], table[layout.early_blocks : used]
    if HOLE in table[:used]:
        return _slots_with_holes(early[:used], late, count, layout, device)
    if not layout.packed:
        return SequenceSlots(cache_slots(late, count, layout.size, device), slice(0, 0), None)
    first = min(count, layout.early_tokens)
    return SequenceSlots(
        cache_slots(early, first, layout.early_size, device),
        cache_slots(late, count - first, layout.size, device),
        None,
    )


def _slots_with_holes(
    early: list[int], late: list[int], count: int, layout: BlockLayout, device: torch.device
) -> SequenceSlots:
    parts = []
    places = []
    for table, size, first in (
        (early, layout.early_size, 0),
        (late, layout.size, layout.early_tokens),
    ):
        held = [i for i, block in enumerate(table) if block != HOLE]
        positions = _within(held, size, device) + first
        there = positions < count
        parts.append(_within([table[i] for i in held], size, device)[there])
        places.append(positions[there])
    if layout.packed:
        return SequenceSlots(parts[0], parts[1], torch.cat(places))
    return SequenceSlots(parts[1], slice(0, 0), places[1])


def _within(blocks: list[int], size: int, device: torch.device) -> Tensor:
    """Every place in these blocks, in order: (blocks * size,)."""
    starts = torch.tensor(blocks, dtype=torch.long, device=device) * size
    return (starts[:, None] + torch.arange(size, device=device)).flatten()


def _packed_rows(
    form: CacheFormat, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> PackedRows:
    """Memory for rows of this shape (slots, kv_heads, head_dim), quantised."""
    slots, heads, dim = shape
    codes = torch.empty((slots, heads, dim * form.bits // 8), dtype=torch.uint8, device=device)
    sizes = (slots, heads, form.groups(dim), 2)
    if device.type == "cpu":
        # Memory that is zero without having been touched. A scale must never be what lay there
        # before: it is multiplied with what a mask hides.
        count = math.prod(sizes) * dtype.itemsize
        scales = torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(sizes)
    else:
        scales = torch.zeros(sizes, dtype=dtype, device=device)
    plain = codes.view(-1).view(dtype).view(-1, heads, dim)
    return PackedRows(plain, codes, scales, form.bits)


def _rows_per_token(config: AttentionConfig) -> int:
    """How many rows of a head a layer keeps of a token."""
    return config.kv_heads if config.values_in_keys else 2 * config.kv_heads


def _reads_another(config: AttentionConfig) -> bool:
    """Whether a layer keeps nothing, because it reads another one's keys and values."""
    return isinstance(config, SharedAttentionConfig) and config.shared_from is not None


def _state_shapes(
    config: DeltaNetConfig, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each state tensor of one sequence."""
    conv = (config.conv_kernel - 1, config.conv_dim)
    return [(conv, dtype), (config.memory_shape, torch.float32)]
