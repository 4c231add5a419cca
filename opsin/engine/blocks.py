"""Which blocks of the paged cache are empty, held, or kept for whoever asks the same again."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Hands out block numbers 0..num_blocks-1, neighbours where it can, and remembers contents.

    A sequence whose blocks are neighbours is read as one slice, so an allocation continues after
    the sequence's last block if that one is free, and otherwise starts at the lowest free block.

    A full block may be registered under a key that identifies its whole content and all before it.
    When its last holder gives it back, it is kept, oldest to be taken first, until there is no
    empty block left; `match` finds it meanwhile, and several sequences may then hold it at once.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._empty = set(range(num_blocks))
        self._lowest = list(range(num_blocks))  # a heap; entries may be stale
        self._holders: Counter[int] = Counter()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # registered, held by nobody

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, kept ones included."""
        return len(self._empty) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Blocks that nobody holds but whose content may be asked again."""
        return len(self._kept)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` blocks, the first of them `after` + 1 if that is empty; None if too few."""
        if count > self.num_free:
            return None
        blocks = []
        following = None if after is None else after + 1
        for _ in range(count):
            block = following if following in self._empty else self._take()
            assert block is not None
            self._empty.discard(block)
            self._holders[block] = 1
            blocks.append(block)
            following = block + 1
        return blocks

    def _take(self) -> int:
        """The lowest empty block, or the one that was kept longest."""
        if not self._empty:
            block, _ = self._kept.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            return block
        while True:
            block = heapq.heappop(self._lowest)
            if block in self._empty:
                return block

    def release(self, blocks: list[int]) -> None:
        """Give blocks back; each must be held. The last of them will be the first to be reused."""
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} was released twice"
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._key_of:
                self._kept[block] = None
            else:
                self._empty.add(block)
                heapq.heappush(self._lowest, block)

    def register(self, block: int, key: bytes) -> None:
        """Remember what a held, full block contains, unless another block has the same content."""
        assert self._holders[block] > 0, "only a held block has content"
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest run of known keys from the first on, now held by the caller."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._holders[block] += 1
            self._kept.pop(block, None)
            blocks.append(block)
        return blocks

    def forget(self) -> None:
        """Empty every kept block: what is remembered of finished requests goes."""
        while self._kept:
            block, _ = self._kept.popitem()
            del self._block_of[self._key_of.pop(block)]
            self._empty.add(block)
            heapq.heappush(self._lowest, block)

    def check_integrity(self, held: list[int]) -> None:
        """Every block is empty, kept, or held as often as counted; called idle under tests."""
        assert Counter(held) == +self._holders, "holders and counts disagree"
        parts = [self._empty, set(self._kept), set(held)]
        assert sum(map(len, parts)) == self.num_blocks, "a block is lost or counted twice"
        assert set().union(*parts) == set(range(self.num_blocks)), "a block is lost"
        assert {b: k for k, b in self._block_of.items()} == self._key_of, "the index is torn"
        assert set(self._kept) <= set(self._key_of), "an unknown block is kept"
