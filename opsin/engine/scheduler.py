"""Which tokens of which requests run next: pure Python over integers.

There are no prefill and decode phases: each sequence has computed so many of its tokens and wants
the rest. A step gives every sequence that wants one token that one, and shares the rest of a budget
of tokens, bounded in time too, among the others and among waiting ones, while the places and the
cache last: a long prompt takes what short ones leave, and at least half. Without a free block, the
sequence that came last gives its blocks back and later recomputes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import chain, islice

from opsin.decoder.layout import HOLE, BlockLayout, KeptTokens
from opsin.engine.blocks import BlockPool
from opsin.engine.pace import Pace
from opsin.engine.prefix import extend_keys, is_cacheable, usable_tokens
from opsin.engine.sequence import Sequence

LEAST_TOKENS = 256  # of a step that ends before a medium: one of fewer costs more than that gains


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens start..end-1 of a sequence, to be computed in the coming step.

    The last of them are `drafts`, guesses at what comes behind the sequence's last token.
    """

    sequence: Sequence
    start: int
    end: int
    drafts: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's last token, so that a new one is sampled."""
        return self.known_end == len(self.sequence.token_ids)

    @property
    def known_end(self) -> int:
        """Where the sequence's own tokens end and the drafts begin."""
        return self.end - len(self.drafts)

    @property
    def token_ids(self) -> list[int]:
        """The tokens to compute, drafts included."""
        return [*self.sequence.token_ids[self.start : self.known_end], *self.drafts]


def prompt_tokens(step: list[Scheduled]) -> int:
    """A step's tokens without the one that each sequence has while it generates, and drafts."""
    return sum(scheduled.known_end - scheduled.start - 1 for scheduled in step)


class Scheduler:
    """Continuous batching with chunked prefill over a pool of blocks.

    `source_pool` hands out the blocks for encoded media, which a sequence holds while it runs. A
    sequence of more than `long_after` tokens has other rope angles: when one grows past that, all
    of it is computed again. With `kept`, blocks that no later token sees are given back. With
    `leaves_media`, steps end before media that can be encoded meanwhile.
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
        leaves_media: bool = False,
    ) -> None:
        self.pool = pool
        self.leaves_media = leaves_media
        self.prefix_cache = prefix_cache
        self.long_after = long_after
        self.source_pool = source_pool or BlockPool(0)
        self.layout = BlockLayout(layout) if isinstance(layout, int) else layout
        self.kept = kept
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.pace = Pace(max_num_batched_tokens)
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

    def schedule(self, drafts: Mapping[int, SequenceOf[int]] | None = None) -> list[Scheduled]:
        """The tokens of the next step; the sequences' block tables already cover them.

        Sequences that generate come first, with a token each and `drafts` of theirs, by request;
        prompts share what is left, the earliest with at least half of it. Where both are there,
        only one medium is encoded.
        """
        step: list[Scheduled] = []
        for sequence in list(self.running):
            if sequence.lengthen(self.long_after):
                self._preempt(sequence)
        active = [s for s in self.running if _wanted(s)]  # of others no next token is chosen yet
        generating = [s for s in active if _wanted(s) == 1]
        left = self.max_num_batched_tokens
        for sequence in generating:
            if left > 0:
                left -= self._take(sequence, len(sequence.token_ids), step)
        if drafts:
            left -= self._add_drafts(step, drafts, left)
        if len(generating) == len(active) and not self.waiting:
            return step
        prompts = [s for s in active if _wanted(s) > 1]
        asked = len(prompts) + sum(1 for _ in self._startable())
        left = min(left, self.pace.budget(len(generating), asked))
        media = 1 if generating else None
        for i, sequence in enumerate(prompts):
            grant = _share(left, sequence, chain(prompts[i + 1 :], self._startable()))
            left -= self._continue(sequence, grant, step, media)
            media = _media_left(media, step)
        while self.waiting and left > 0 and len(self.running) < self.max_num_seqs:
            grant = _share(left, self.waiting[0], islice(self._startable(), 1, None))
            taken = self._begin(self.waiting[0], grant, step, media)
            if not taken:
                break
            left -= taken
            media = _media_left(media, step)
        return step

    def _startable(self) -> Iterator[Sequence]:
        """Waiting sequences for which there are places."""
        return islice(self.waiting, self.max_num_seqs - len(self.running))

    def _continue(
        self, sequence: Sequence, budget: int, step: list[Scheduled], media: int | None = None
    ) -> int:
        """Put some of a running sequence's next tokens into the step; how many."""
        if budget <= 0 or sequence not in self.running:
            return 0
        end = self._end(sequence, budget, media)
        return self._take(sequence, end, step) if end > sequence.num_computed else 0

    def _take(self, sequence: Sequence, end: int, step: list[Scheduled]) -> int:
        """Put a running sequence's tokens up to `end` into the step, unless it was preempted; how
        many. Blocks for them are taken from later sequences if need be.
        """
        if sequence not in self.running:
            return 0
        while not self._grow(sequence, end):
            victim = self.running[-1]
            if victim is sequence and len(self.running) == 1 and not step:
                raise AssertionError("a sequence that fits the cache alone found no blocks")
            self._preempt(victim)
            step[:] = [scheduled for scheduled in step if scheduled.sequence is not victim]
            if victim is sequence:
                return 0
        step.append(Scheduled(sequence, sequence.num_computed, end))
        return end - sequence.num_computed

    def _end(self, sequence: Sequence, budget: int, media: int | None) -> int:
        """Up to where a step computes a sequence, of at most `budget` tokens and so many media."""
        end = sequence.media_end(sequence.num_computed + budget, media)
        if self.leaves_media:
            end = sequence.ahead_end(end, LEAST_TOKENS)
        return sequence.chunk_end(end)

    def _add_drafts(
        self, step: list[Scheduled], drafts: Mapping[int, SequenceOf[int]], budget: int
    ) -> int:
        """Put drafts behind the last tokens in the step, where blocks are free; how many."""
        taken = 0
        for i, scheduled in enumerate(step):
            own = tuple(drafts.get(scheduled.sequence.request_id, ()))[: budget - taken]
            end = scheduled.end + len(own)
            if own and self._grow(scheduled.sequence, end):
                step[i] = replace(scheduled, end=end, drafts=own)
                taken += len(own)
        return taken

    def _begin(
        self, sequence: Sequence, budget: int, step: list[Scheduled], media: int | None
    ) -> int:
        """Start the sequence that waits longest, if all is there that it needs; tokens taken."""
        sequence.lengthen(self.long_after)
        self._reuse(sequence)
        end = self._end(sequence, budget, media)
        if end == sequence.num_computed or not self._start(sequence, end):
            self._release(sequence)
            sequence.num_computed = 0
            return 0
        self.waiting.popleft()
        sequence.state_slot = self.free_state_slots.pop()
        self.running.append(sequence)
        step.append(Scheduled(sequence, sequence.num_computed, end))
        return end - sequence.num_computed

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
        """Record that a step has run; which of its drafts were right, `accept` is told."""
        for scheduled in step:
            self._record(scheduled.sequence, scheduled.start, scheduled.known_end)

    def accept(self, sequence: Sequence) -> None:
        """Record that a sequence's last token is one that the last step computed as a draft."""
        self._record(sequence, sequence.num_computed, sequence.num_computed + 1)

    def _record(self, sequence: Sequence, start: int, end: int) -> None:
        """Tokens start..end-1 are computed."""
        sequence.num_computed = end
        full = range(self.layout.full_blocks(start), self.layout.full_blocks(end))
        if full and self.prefix_cache and is_cacheable(sequence):
            keys = extend_keys(sequence, self.layout, end)
            for i in full:
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


def _wanted(sequence: Sequence) -> int:
    """Tokens of a sequence that are not computed."""
    return len(sequence.token_ids) - sequence.num_computed


def _share(left: int, sequence: Sequence, later: Iterable[Sequence]) -> int:
    """Of `left` tokens, those that later sequences leave to one: the ones that want fewer."""
    spare, wanted = left, _wanted(sequence)
    for other in later:
        spare -= _wanted(other) if _wanted(other) < wanted else 0
        if spare <= left // 2:
            return -(-left // 2)
    return spare


def _media_left(media: int | None, step: list[Scheduled]) -> int | None:
    """How many media the rest of a step may encode, None for any number."""
    if media is None or not step:
        return media
    last = step[-1]
    return 0 if last.sequence.media_end(last.end, 0) < last.end else media
