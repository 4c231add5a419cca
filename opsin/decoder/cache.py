"""What layers remember: token slots handed out in blocks, and states handed out one a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opsin.decoder.config import (
    AttentionConfig,
    CrossAttentionConfig,
    DecoderConfig,
    DeltaNetConfig,
    SharedAttentionConfig,
)


class PagedCache:
    """What every layer remembers of every sequence.

    A softmax attention layer has keys and values, (slots, kv_heads, head_dim), where slot = block *
    size + offset; so has a cross-attention layer, in blocks of their own, for the encoded media; a
    recurrent layer has states, tensors whose first axis is a sequence's state slot
    (for a delta network: the convolution's inputs (state slots, kernel - 1, channels) and the
    memory (state slots, heads, key_dim, value_dim), float32). The lists run over all layers and are
    empty where the layer is of another kind.

    Which blocks and state slots belong to which sequence is the scheduler's business. Memory is
    reserved at once but, on a CPU, only touched as it is used.
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
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
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
            self.keys.append(torch.empty(shape, dtype=dtype, device=device))
            self.values.append(torch.empty(shape, dtype=dtype, device=device))
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
    def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Cache memory that one token takes over all layers."""
        own = [a for a in config.attentions if not _reads_another(a)]
        return sum(2 * a.kv_heads * a.head_dim for a in own) * dtype.itemsize

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
    blocks = torch.tensor(table[:used], device=device)
    slots = blocks[:, None] * block_size + torch.arange(block_size, device=device)
    return slots.flatten()[:count]


def _reads_another(config: AttentionConfig) -> bool:
    """Whether a layer keeps nothing, because it reads another one's keys and values."""
    return isinstance(config, SharedAttentionConfig) and config.shared_from is not None


def _state_shapes(
    config: DeltaNetConfig, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each state tensor of one sequence."""
    conv = (config.conv_kernel - 1, config.conv_dim)
    return [(conv, dtype), (config.memory_shape, torch.float32)]
