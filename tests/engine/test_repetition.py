"""The n-gram blocker against its definition, and when a request gets one."""

from __future__ import annotations

import time
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.engine.repetition import NoRepeatNgram, no_repeat_ngram
from opsin.families.base import Family
from opsin.types import SamplingParams

VOCAB = 5


def banned_by_definition(
    generated: list[int], size: int, window: int | None, allowed: set[int]
) -> set[int]:
    """Every token that would end a run of `size` that began in the last `window` tokens."""
    if len(generated) < size:
        return set()
    beginning = generated[len(generated) - size + 1 :]
    first = 0 if window is None else max(0, len(generated) - window)
    runs = [generated[i : i + size] for i in range(first, len(generated) - size + 1)]
    return {run[-1] for run in runs if run[:-1] == beginning} - allowed


def banned(blocker: NoRepeatNgram, tokens: list[int], num_prompt: int) -> set[int]:
    logits = blocker(torch.zeros(VOCAB), tokens, num_prompt)
    return set(logits.isneginf().nonzero().flatten().tolist())


TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=60)


@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=4),
    generated=TOKENS,
    size=st.integers(1, 5),
    window=st.none() | st.integers(1, 20),
    allowed=st.sets(st.integers(0, VOCAB - 1), max_size=2),
)
def test_token_by_token_it_is_the_definition(
    prompt: list[int], generated: list[int], size: int, window: int | None, allowed: set[int]
) -> None:
    blocker = NoRepeatNgram(size, window, allowed)
    for count in range(len(generated) + 1):
        expected = banned_by_definition(generated[:count], size, window, allowed)
        assert banned(blocker, prompt + generated[:count], len(prompt)) == expected


@given(first=TOKENS, second=TOKENS, size=st.integers(1, 4), window=st.none() | st.integers(1, 12))
def test_tokens_that_were_taken_back_leave_nothing(
    first: list[int], second: list[int], size: int, window: int | None
) -> None:
    blocker = NoRepeatNgram(size, window)
    banned(blocker, [9, *first], 1)
    kept = first[: len(first) // 2]
    for tokens in (kept, kept + second):
        expected = banned_by_definition(tokens, size, window, set())
        if tokens[-size:] != first[len(tokens) - size : len(tokens)] or len(tokens) < len(first):
            assert banned(blocker, [9, *tokens], 1) == expected


def test_a_token_costs_the_same_in_a_large_window() -> None:
    def seconds(window: int) -> float:
        blocker, tokens = NoRepeatNgram(8, window), list(range(window))
        logits = torch.zeros(window + 200)
        blocker(logits, tokens, 0)
        started = time.process_time()
        for token in range(200):
            tokens.append(window + token)
            blocker(logits, tokens, 0)
        return time.process_time() - started

    small = min(seconds(500) for _ in range(3))
    large = min(seconds(50_000) for _ in range(3))
    assert large < 20 * small + 0.05


class Repetitive(Family):
    no_repeat_ngram = (20, 50, ("<td>",))


class Words:
    """A tokenizer that knows one word."""

    def token_to_id(self, token: str) -> int | None:
        return {"<td>": 3}.get(token)


def blocker_of(family: type[Family], **sampling: Any) -> list[Any]:
    return no_repeat_ngram(family({}, {}), Words(), SamplingParams(**sampling))


def test_the_family_decides_unless_the_request_does() -> None:
    (own,) = blocker_of(Repetitive)
    assert (own.size, own.window, own.allowed) == (20, 50, {3})
    (asked,) = blocker_of(Repetitive, no_repeat_ngram_size=30, no_repeat_ngram_window=90)
    assert (asked.size, asked.window, asked.allowed) == (30, 90, {3})
    assert blocker_of(Repetitive, no_repeat_ngram_size=0) == []
    assert blocker_of(Family) == []
    (alone,) = blocker_of(Family, no_repeat_ngram_size=4)
    assert (alone.size, alone.window, alone.allowed) == (4, None, frozenset())
