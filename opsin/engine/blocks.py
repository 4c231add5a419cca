"""Which blocks of the paged cache are free: pure bookkeeping over integers."""

from __future__ import annotations

import heapq


class BlockPool:
    """Hands out block numbers 0..num_blocks-1, neighbours where it can.

    A sequence whose blocks are neighbours is read as one slice, so an allocation continues after
    the sequence's last block if that one is free, and otherwise starts at the lowest free block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = set(range(num_blocks))
        self._lowest = list(range(num_blocks))  # a heap; entries may be stale

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` blocks, the first of them `after` + 1 if that is free; None if there are too
        few.
        """
        if count > len(self._free):
            return None
        blocks = []
        following = None if after is None else after + 1
        for _ in range(count):
            block = following if following in self._free else self._pop_lowest()
            assert block is not None
            self._free.discard(block)
            blocks.append(block)
            following = block + 1
        return blocks

    def _pop_lowest(self) -> int:
        while True:
            block = heapq.heappop(self._lowest)
            if block in self._free:
                return block

    def release(self, blocks: list[int]) -> None:
        """Give blocks back; each must be held."""
        for block in blocks:
            assert block not in self._free, f"block {block} was released twice"
            self._free.add(block)
            heapq.heappush(self._lowest, block)

    def check_integrity(self, held: list[int]) -> None:
        """Every block is free or held by exactly one sequence; called when idle under tests."""
        assert len(set(held)) == len(held), "a block belongs to two sequences"
        assert not self._free & set(held), "a free block is in use"
        assert len(self._free) + len(held) == self.num_blocks, "a block is lost"
