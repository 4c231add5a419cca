"""Keeps a model from going round in circles: no run of tokens comes twice within a window.

The definition is that of the scripts DeepSeek published with its OCR models: only generated tokens
count, and tokens such as those that open a table's cells are always allowed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from opsin.engine.sampler import LogitsProcessor
from opsin.families.base import Family
from opsin.prompt.tokenizer import Tokenizer
from opsin.types import SamplingParams

Run = tuple[int, ...]


class NoRepeatNgram:
    """Forbids the token that would complete a run of `size` tokens seen in the last `window`.

    window None looks at all generated tokens. Keeps the runs of the window in a table, so that a
    token costs O(size), however large the window is. One instance serves one request.
    """

    def __init__(self, size: int, window: int | None, allowed: Iterable[int] = ()) -> None:
        self.size = size
        self.window = window
        self.allowed: Collection[int] = frozenset(allowed)
        self._forget()

    def _forget(self) -> None:
        self.taken = 0  # generated tokens in the table so far
        self.tail: list[int] = []  # the last of them
        self.runs: deque[tuple[int, Run, int]] = deque()  # (start, all but the last, last)
        self.endings: dict[Run, Counter[int]] = {}

    def __call__(self, logits: Tensor, token_ids: Sequence[int], num_prompt: int) -> Tensor:
        length = len(token_ids) - num_prompt
        known = num_prompt + self.taken
        if list(token_ids[known - len(self.tail) : known]) != self.tail:
            self._forget()  # tokens were taken back, as after a wrong guess
        for end in range(self.taken + 1, length + 1):
            self._take(token_ids, num_prompt, end)
        self.taken = length
        self.tail = list(token_ids[max(num_prompt, len(token_ids) - self.size) :])
        if self.window is not None:
            self._drop_before(length - self.window)
        if length < self.size:
            return logits
        beginning = tuple(token_ids[len(token_ids) - self.size + 1 :])
        banned = [t for t in self.endings.get(beginning, ()) if t not in self.allowed]
        if banned:
            logits[banned] = -float("inf")
        return logits

    def _take(self, token_ids: Sequence[int], num_prompt: int, end: int) -> None:
        """Enter the run that ends before generated token `end`."""
        start = end - self.size
        if start < 0:
            return
        *beginning, last = token_ids[num_prompt + start : num_prompt + end]
        run = tuple(beginning)
        self.runs.append((start, run, last))
        self.endings.setdefault(run, Counter())[last] += 1

    def _drop_before(self, first: int) -> None:
        """Take out the runs that begin before the window."""
        while self.runs and self.runs[0][0] < first:
            _, run, last = self.runs.popleft()
            endings = self.endings[run]
            endings[last] -= 1
            if endings[last] == 0:
                del endings[last]
            if not endings:
                del self.endings[run]


def no_repeat_ngram(
    family: Family, tokenizer: Tokenizer | None, params: SamplingParams
) -> list[LogitsProcessor]:
    """The blocker that a request gets: the family's own unless its parameters say otherwise."""
    own_size, own_window, own_allowed = family.no_repeat_ngram or (0, None, ())
    size, window = params.no_repeat_ngram_size, params.no_repeat_ngram_window
    size = own_size if size is None else size
    window = own_window if window is None else window
    if size == 0:
        return []
    ids = (tokenizer.token_to_id(token) for token in own_allowed) if tokenizer is not None else ()
    return [NoRepeatNgram(size, window, (i for i in ids if i is not None))]
