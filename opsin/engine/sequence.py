"""One request inside the engine: its tokens, how many are computed, and what it holds."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field

from opsin.families.base import Encoded, Prompt
from opsin.families.speaking import Speaker
from opsin.types import SamplingParams, Timings


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's state.

    Filled by: submit (prompt, sampling, speaker), scheduler (num_computed, block_table,
    source_table, long, and while it runs state_slot), runner (encoded), sampler (token_ids), loop
    (num_drafted, num_accepted: guesses at its tokens that were computed, and those of them that
    were right). The next step computes tokens num_computed up to len(token_ids); when those reach
    the end, a new token is sampled.
    Blocks that its window has left are holes in block_table, all of them before num_dropped.
    """

    request_id: int
    prompt: Prompt
    sampling: SamplingParams
    token_ids: list[int]
    num_prompt: int
    num_computed: int = 0
    num_cached: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    block_table: list[int] = field(default_factory=list)
    num_dropped: int = 0
    block_keys: list[bytes] = field(default_factory=list)
    state_slot: int = 0
    source_table: list[int] = field(default_factory=list)
    encoded: dict[int, Encoded] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    submitted: float = field(default_factory=time.perf_counter)
    started: float = 0.0
    first_token: float = 0.0
    num_preemptions: int = 0
    long: bool = False
    speaker: Speaker | None = None

    @classmethod
    def start(cls, request_id: int, prompt: Prompt, sampling: SamplingParams) -> Sequence:
        """A new sequence with nothing computed yet."""
        ids = list(prompt.token_ids)
        timings = dataclasses.replace(prompt.timings)
        return cls(request_id, prompt, sampling, ids, len(ids), timings=timings)

    @property
    def num_generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt

    @property
    def num_source(self) -> int:
        """Rows of encoded media that cross-attention layers keep for it."""
        return 0 if self.prompt.source is None else self.prompt.source.views.shape[1]

    @property
    def output_ids(self) -> list[int]:
        """The sampled tokens."""
        return self.token_ids[self.num_prompt :]

    def lengthen(self, long_after: int | None) -> bool:
        """Go over to the long rope angles if it has more tokens than have the short ones.

        True if that makes what is computed worthless.
        """
        if self.long or long_after is None or len(self.token_ids) <= long_after:
            return False
        self.long = True
        self.block_keys.clear()
        return True

    def media_end(self, limit: int, count: int | None) -> int:
        """The furthest token, at most `limit`, before which at most `count` media, None for any
        number, are still to be encoded. Media that layers read are encoded all at once.
        """
        if count is None or self.num_source:
            return limit
        starts = sorted(
            max(int(item.indices[0]), self.num_computed)
            for i, item in enumerate(self.prompt.media)
            if i not in self.encoded and int(item.indices[-1]) >= self.num_computed
        )
        return min(limit, starts[count]) if count < len(starts) else limit

    def next_medium(self, end: int) -> int | None:
        """The number of the first medium that begins at token `end` or behind, if it is still to be
        encoded.
        """
        starts = [(int(item.indices[0]), i) for i, item in enumerate(self.prompt.media)]
        first = min((each for each in starts if each[0] >= end), default=None)
        return None if first is None or first[1] in self.encoded else first[1]

    def ahead_end(self, limit: int, least: int) -> int:
        """The furthest token, at most `limit`, that leaves a medium to be encoded meanwhile: where
        one begins, at least `least` tokens on.
        """
        starts = (
            int(item.indices[0])
            for i, item in enumerate(self.prompt.media)
            if i not in self.encoded
        )
        least += self.num_computed
        return min((start for start in starts if least <= start < limit), default=limit)

    def chunk_end(self, limit: int) -> int:
        """The furthest token, at most `limit` exclusive, that the next step may compute up to.

        An atomic span is computed whole: if the limit falls inside one, the step ends before it,
        or, when it would then be empty, goes to the span's end.
        """
        end = min(limit, len(self.token_ids))
        for first, last in self.prompt.atomic_spans:
            if first < end < last:
                return first if first > self.num_computed else last
        return end
