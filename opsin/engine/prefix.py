"""Keys of cache blocks: equal only if everything up to the block's end is equal, media included."""

from __future__ import annotations

import hashlib
import secrets
import struct

from opsin.decoder.layout import BlockLayout
from opsin.engine.sequence import Sequence

# A key says nothing to who does not know this process's secret: contents cannot be guessed by
# making blocks collide, nor recognised in another process.
_SECRET = secrets.token_bytes(32)


def extend_keys(sequence: Sequence, layout: BlockLayout, num_tokens: int) -> list[bytes]:
    """The keys of a sequence's full blocks within its first `num_tokens`, kept on the sequence.

    A key is SHA-256 over the key before it, the block's token ids, and for each medium whose tokens
    lie in the block, its content key and which of its tokens they are. The chain starts from this
    process's secret, the adapter and rope angles that compute the tokens and the request's
    `cache_salt`.
    """
    keys = sequence.block_keys
    for index in range(len(keys), layout.full_blocks(num_tokens)):
        start, end = layout.start(index), layout.start(index + 1)
        adapter = repr((sequence.prompt.adapter, sequence.long)).encode()
        parent = keys[-1] if keys else _SECRET + adapter + b":" + sequence.prompt.cache_salt
        digest = hashlib.sha256(parent)
        digest.update(struct.pack(f"<{end - start}q", *sequence.token_ids[start:end]))
        for item in sequence.prompt.media if start < sequence.num_prompt else ():
            first, last = int(item.indices[0]), int(item.indices[-1])
            if first < end and last >= start:
                digest.update(struct.pack("<qq", first - start, item.num_tokens))
                digest.update(item.key)
        keys.append(digest.digest())
    return keys


def is_cacheable(sequence: Sequence) -> bool:
    """Whether blocks may be known by their tokens and media: every medium says what it contains.

    Where layers read encoded media, even tokens before a medium depend on it. A speaker that reads
    the prompt's last stream has to have it computed.
    """
    if sequence.speaker is not None and sequence.speaker.reads:
        return False
    return sequence.num_source == 0 and all(item.key for item in sequence.prompt.media)


def usable_tokens(sequence: Sequence, matched: int, layout: BlockLayout) -> int:
    """How many of `matched` cached tokens a sequence may skip.

    At least its last token is computed, and an atomic span is computed whole: one that the match
    cuts is computed from its start.
    """
    limit = min(matched, len(sequence.token_ids) - 1)
    for first, last in sorted(sequence.prompt.atomic_spans, reverse=True):
        if first < limit < last:
            limit = first
    return layout.start(layout.full_blocks(limit))
