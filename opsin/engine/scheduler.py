"""Which tokens of which requests run next: pure Python over integers.

There are no prefill and decode phases: each sequence has computed so many of its tokens and wants
the rest. A step gives every running sequence what it wants, up to a budget of tokens, then starts
waiting ones while the budget, the places and the cache last. Without a free block, the sequence
that came last gives its blocks back and later recomputes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from opsin.decoder.layout import HOLE, BlockLayout, KeptTokens
from opsin.engine.blocks import BlockPool
from opsin.engine.prefix import extend_keys, is_cacheable, usable_tokens
from opsin.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens start..end-1 of a sequence, to be computed in the coming step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one is sampled."""
        return self.end == len(self.sequence.token_ids)


class Scheduler:
    """Continuous batching with chunked prefill over a pool of blocks.

    `source_pool` hands out the blocks for encoded media, which a sequence holds while it runs. A
    sequence of more than `long_after` tokens has other rope angles: when one grows past that, all
    of it is computed again. With `kept`, blocks that no later token sees are given back.
    """

    def __init__(
        self,
        pool: BlockPool,
        layout: BlockLayout | int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        source_pool: BlockPool | None = None,
        prefix_cache: bool = True,
        long_after: int | None = None,
        kept: KeptTokens | None = None,
    ) -> None:
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.long_after = long_after
        self.source_pool = source_pool or BlockPool(0)
        self.layout = BlockLayout(layout) if isinstance(layout, int) else layout
        self.kept = kept
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free_state_slots = list(range(max_num_seqs))

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def can_ever_run(self, num_tokens: int, num_source: int = 0, longest_span: int = 0) -> bool:
        """Whether a sequence of this many tokens and source rows fits the cache when alone.

        `longest_span` is that of its atomic spans, which one step computes whole.
        """
        blocks = self.layout.blocks_for(num_tokens)
        if self.kept is not None:
            step = max(self.max_num_batched_tokens, longest_span)
            blocks = self.kept.blocks_for(self.layout, num_tokens, step)
        fits = blocks <= self.pool.num_blocks
        return fits and self._source_blocks(num_source) <= self.source_pool.num_blocks

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """The tokens of the next step; the sequences' block tables already cover them."""
        budget = self.max_num_batched_tokens
        step: list[Scheduled] = []
        for sequence in list(self.running):
            if budget <= 0:
                break
            if sequence not in self.running:  # preempted by one before it
                continue
            if sequence.num_computed == len(sequence.token_ids):  # its next token is not chosen yet
                continue
            if sequence.lengthen(self.long_after):
                self._preempt(sequence)
                continue
            scheduled = self._place(sequence, budget, step)
            if scheduled is not None:
                step.append(scheduled)
                budget -= scheduled.end - scheduled.start
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            sequence.lengthen(self.long_after)
            self._reuse(sequence)
            end = sequence.chunk_end(sequence.num_computed + budget)
            if not self._start(sequence, end):
                self._release(sequence)
                sequence.num_computed = 0
                break
            self.waiting.popleft()
            sequence.state_slot = self.free_state_slots.pop()
            self.running.append(sequence)
            step.append(Scheduled(sequence, sequence.num_computed, end))
            budget -= end - sequence.num_computed
        return step

    def _place(self, sequence: Sequence, budget: int, step: list[Scheduled]) -> Scheduled | None:
        """Blocks for a running sequence's next tokens, taken from later ones if need be."""
        end = sequence.chunk_end(sequence.num_computed + budget)
        while not self._grow(sequence, end):
            victim = self.running[-1]
            if victim is sequence and len(self.running) == 1 and not step:
                raise AssertionError("a sequence that fits the cache alone found no blocks")
            self._preempt(victim)
            if victim is sequence:
                return None
        return Scheduled(sequence, sequence.num_computed, end)

    def _start(self, sequence: Sequence, num_tokens: int) -> bool:
        """Everything that a sequence needs to start, or nothing."""
        source = self.source_pool.allocate(self._source_blocks(sequence.num_source))
        if source is None:
            return False
        if not self._grow(sequence, num_tokens):
            self.source_pool.release(source)
            return False
        sequence.source_table = source
        return True

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        missing = self.layout.blocks_for(num_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        last = sequence.block_table[-1] if sequence.block_table else None
        blocks = self.pool.allocate(missing, after=last)
        if blocks is None:
            return False
        sequence.block_table.extend(blocks)
        return True

    def _source_blocks(self, num_rows: int) -> int:
        return -(-num_rows // self.layout.size)

    def _reuse(self, sequence: Sequence) -> None:
        """Start a sequence from cached blocks that hold the beginning of its tokens."""
        if not self.prefix_cache or sequence.num_source or not is_cacheable(sequence):
            return
        keys = extend_keys(sequence, self.layout, len(sequence.token_ids))
        blocks = self.pool.match(keys)
        usable = usable_tokens(sequence, self.layout.start(len(blocks)), self.layout)
        count = self.layout.full_blocks(usable)
        self.pool.release(blocks[count:])
        sequence.block_table = blocks[:count]
        sequence.num_computed = sequence.num_cached = usable
        self._drop(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.free_state_slots.append(sequence.state_slot)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release([block for block in sequence.block_table if block != HOLE])
        self.source_pool.release(sequence.source_table)
        sequence.block_table, sequence.source_table = [], []
        sequence.num_dropped = 0

    def _drop(self, sequence: Sequence) -> None:
        """Give back the blocks that nothing of a sequence sees any more."""
        if self.kept is None:
            return
        table = sequence.block_table
        gone = self.kept.droppable(self.layout, sequence.num_computed, sequence.num_dropped)
        self.pool.release([table[i] for i in gone])
        for i in gone:
            table[i] = HOLE
        sequence.num_dropped = gone.stop

    def computed(self, step: list[Scheduled]) -> None:
        """Record that a step has run."""
        for scheduled in step:
            sequence = scheduled.sequence
            sequence.num_computed = scheduled.end
            if self.prefix_cache and is_cacheable(sequence):
                keys = extend_keys(sequence, self.layout, scheduled.end)
                first, last = map(self.layout.full_blocks, (scheduled.start, scheduled.end))
                for i in range(first, last):
                    self.pool.register(sequence.block_table[i], keys[i])
            self._drop(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free what it holds."""
        if sequence in self.running:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def check_integrity(self) -> None:
        """The pools and what the sequences hold agree; called when idle under tests."""
        sequences = [*self.running, *self.waiting]
        self.pool.check_integrity(
            [block for seq in sequences for block in seq.block_table if block != HOLE]
        )
        self.source_pool.check_integrity([b for seq in sequences for b in seq.source_table])
        slots = [sequence.state_slot for sequence in self.running] + self.free_state_slots
        assert sorted(slots) == list(range(self.max_num_seqs)), "a state slot is lost or shared"
