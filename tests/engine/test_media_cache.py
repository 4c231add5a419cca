"""The cache of encoded media: what is asked again is not encoded again, within bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opsin.engine.media_cache import EncodedCache
from opsin.families.base import Encoded, MediaInput

ITEM_BYTES = 4 * 10


def item(key: bytes, kind: str = "image") -> MediaInput:
    return MediaInput(kind, {}, "", 10, key=key)


class Tower:
    """Counts what it encodes."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def __call__(self, items: Sequence[MediaInput]) -> list[Encoded]:
        self.seen.extend(item.key for item in items)
        return [Encoded(torch.full((10, 1), float(len(item.key)))) for item in items]


def encode(
    cache: EncodedCache, items: list[MediaInput], tower: Tower, salt: bytes = b""
) -> list[Encoded]:
    return cache.encode(items, [salt] * len(items), tower)


def test_what_is_known_is_not_encoded_again_and_order_is_kept() -> None:
    cache, tower = EncodedCache(1000), Tower()
    encode(cache, [item(b"a")], tower)
    results = encode(cache, [item(b"bb"), item(b"a"), item(b"bb")], tower)
    assert tower.seen == [b"a", b"bb"]
    assert [float(r.embeds[0, 0]) for r in results if r.embeds is not None] == [2.0, 1.0, 2.0]
    assert (cache.hits, cache.misses) == (1, 2)


def test_kinds_and_nameless_items_are_kept_apart() -> None:
    cache, tower = EncodedCache(1000), Tower()
    encode(cache, [item(b"a"), item(b"a", "audio"), item(b""), item(b"")], tower)
    assert tower.seen == [b"a", b"a", b"", b""]
    encode(cache, [item(b"")], tower)
    assert tower.seen[-1] == b""
    assert len(tower.seen) == 5


def test_the_oldest_goes_when_the_bytes_are_used_up() -> None:
    cache, tower = EncodedCache(2 * ITEM_BYTES), Tower()
    for key in (b"a", b"bb", b"a", b"ccc"):
        encode(cache, [item(key)], tower)
    assert cache.num_bytes == 2 * ITEM_BYTES
    encode(cache, [item(b"a")], tower)
    assert tower.seen == [b"a", b"bb", b"ccc"]
    encode(cache, [item(b"bb")], tower)
    assert tower.seen[-1] == b"bb"


def test_no_bytes_keep_nothing() -> None:
    cache, tower = EncodedCache(0), Tower()
    encode(cache, [item(b"a")], tower)
    encode(cache, [item(b"a")], tower)
    assert tower.seen == [b"a", b"a"]
    assert cache.num_bytes == 0


def test_row_05_another_salt_finds_nothing() -> None:
    cache, tower = EncodedCache(1000), Tower()
    encode(cache, [item(b"a")], tower, b"one")
    encode(cache, [item(b"a")], tower, b"two")
    encode(cache, [item(b"a")], tower, b"one")
    assert tower.seen == [b"a", b"a"]
    cache.encode([item(b"a"), item(b"a")], [b"two", b"three"], tower)
    assert tower.seen == [b"a", b"a", b"a"]
