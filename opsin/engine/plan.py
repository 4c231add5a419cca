"""How the memory for the cache is shared out among what layers remember."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opsin.decoder.cache import CacheFormat, PagedCache
from opsin.decoder.config import DecoderConfig
from opsin.decoder.layout import KeptTokens
from opsin.errors import InputError


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Blocks for text, sequences with a state that may run at once, and blocks for media."""

    num_blocks: int
    num_state_slots: int
    num_source_blocks: int

    @classmethod
    def of(
        cls,
        config: DecoderConfig,
        dtype: torch.dtype,
        memory: int,
        *,
        block_size: int,
        max_num_seqs: int,
        max_context: int,
        form: CacheFormat = CacheFormat(),  # noqa: B008  frozen
        kept: KeptTokens | None = None,
        step: int = 0,
    ) -> CachePlan:
        """A plan for so many bytes, where a step computes up to `step` tokens.

        States take at most half, for as many sequences as that holds; encoded media take half of
        the rest if the decoder has layers that read them. Raises InputError for too few bytes.
        """
        per_slot = PagedCache.bytes_per_state_slot(config, dtype)
        fitting = memory // 2 // per_slot if per_slot else max_num_seqs
        slots = max(1, min(fitting, max_num_seqs))
        left = memory - slots * per_slot
        per_row = PagedCache.bytes_per_source_token(config, dtype)
        source_blocks = left // 2 // per_row // block_size if per_row else 0
        left -= source_blocks * block_size * per_row
        per_token = PagedCache.bytes_per_token(config, dtype, form)
        tokens = left // max(per_token, 1)
        if min(tokens, max_context * slots) < block_size:
            raise InputError(
                "The memory for the key-value cache is too small",
                why=f"{memory} bytes hold {max(tokens, 0)} tokens",
                remedy="Raise it",
                param="memory",
            )
        layout = form.layout(block_size, dtype)
        most = layout.blocks_for(max_context)
        if kept is not None:
            most = kept.blocks_for(layout, max_context, step)
        return cls(min(-(-tokens // block_size), most * slots), slots, source_blocks)
