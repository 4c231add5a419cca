"""The paged key-value cache: one pool of token slots a layer, handed out in blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from opsin.decoder.config import DecoderConfig


class PagedCache:
    """Keys and values of every layer, (slots, kv_heads, head_dim), where slot = block * size +
    offset.

    Which blocks belong to which sequence is the scheduler's business. Memory is reserved at once
    but, on a CPU, only touched as blocks are used.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in config.layers:
            shape = (num_blocks * block_size, layer.attention.kv_heads, layer.attention.head_dim)
            self.keys.append(torch.empty(shape, dtype=dtype, device=device))
            self.values.append(torch.empty(shape, dtype=dtype, device=device))

    @staticmethod
    def bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Cache memory that one token takes over all layers."""
        attentions = [layer.attention for layer in config.layers]
        return sum(2 * a.kv_heads * a.head_dim for a in attentions) * dtype.itemsize
