"""Where the tokens of a sequence lie within its blocks: pure integers."""

from __future__ import annotations

from dataclasses import dataclass

HOLE = -1  # stands in a block table for a block that was given back, being out of the window


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """A sequence's first `early_blocks` blocks hold `early_size` tokens each, all others `size`.

    Blocks of both kinds take the same memory: where a cache quantises, early blocks hold fewer
    tokens, unquantised. Without early blocks every block holds `size` tokens, quantised or not.
    """

    size: int
    early_blocks: int = 0
    early_size: int = 1
    packed: bool = False

    @property
    def early_tokens(self) -> int:
        """Tokens that the early blocks hold together."""
        return self.early_blocks * self.early_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        early = min(tokens, self.early_tokens)
        return -(-early // self.early_size) - (-(tokens - early) // self.size)

    def full_blocks(self, tokens: int) -> int:
        """Blocks that so many tokens fill."""
        early = min(tokens, self.early_tokens)
        return early // self.early_size + (tokens - early) // self.size

    def start(self, block: int) -> int:
        """The first token of the sequence's block of this index."""
        early = min(block, self.early_blocks)
        return early * self.early_size + (block - early) * self.size

    def slot(self, table: list[int], token: int) -> int:
        """The cache slot of a token; -1 - slot where it is one of a quantised row."""
        late = token - self.early_tokens
        if late < 0:
            return table[token // self.early_size] * self.early_size + token % self.early_size
        slot = table[self.early_blocks + late // self.size] * self.size + late % self.size
        return -1 - slot if self.packed else slot


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """What is kept of a long sequence: its `first` tokens and its `last` ones, a new one included.

    Every token sees no others (arXiv:2309.17453); positions go on counting.
    """

    first: int
    last: int

    def droppable(self, layout: BlockLayout, computed: int, dropped: int) -> range:
        """Blocks from index `dropped` on that no token from `computed` on sees.

        The blocks that hold the first tokens are never among them.
        """
        start = max(dropped, layout.blocks_for(self.first))
        return range(start, max(start, layout.full_blocks(computed - self.last + 1)))

    def blocks_for(self, layout: BlockLayout, tokens: int, step: int) -> int:
        """The most blocks that a sequence of so many tokens holds at once, in steps of `step`."""
        most = layout.blocks_for(self.first + self.last + step) + 2
        return min(layout.blocks_for(tokens), most)
