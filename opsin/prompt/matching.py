"""Finds any of several strings in text that arrives in pieces, in time linear in the text."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Match:
    """A pattern found: its index, the text before it not given out yet, and the text after it."""

    index: int
    before: str
    rest: str


class StreamMatcher:
    """Looks for the patterns in a stream of text, holding back what may be the start of one.

    The match that ends first counts; of those that end together, the longest. Each pattern is
    followed by its own automaton (Knuth, Morris and Pratt, 1977).
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        if not all(patterns):
            raise ValueError("an empty pattern would match everywhere")
        self._patterns = tuple(patterns)
        self._borders = [_borders(pattern) for pattern in patterns]
        self._states = [0] * len(self._patterns)
        self._firsts = {pattern[0] for pattern in patterns}
        self._held = ""

    def push(self, text: str) -> tuple[str, Match | None]:
        """The text that is certainly no part of a match, or the first match.

        A match's `rest` has not been looked at; the matcher starts afresh after it.
        """
        if not self._held and not any(first in text for first in self._firsts):
            return text, None
        whole = self._held + text
        start = len(self._held)
        for at in range(start, len(whole)):
            found = self._step(whole[at])
            if found is not None:
                end = at + 1
                self._reset()
                before = whole[: end - len(self._patterns[found])]
                return "", Match(found, before, whole[end:])
        held = max(self._states, default=0)
        self._held = whole[len(whole) - held :]
        return whole[: len(whole) - held], None

    def finish(self) -> str:
        """What was held back."""
        held = self._held
        self._reset()
        return held

    def _step(self, char: str) -> int | None:
        """Advance every automaton by a character; the longest pattern that is now complete."""
        found: int | None = None
        for index, pattern in enumerate(self._patterns):
            state = self._states[index]
            borders = self._borders[index]
            while state and pattern[state] != char:
                state = borders[state - 1]
            if pattern[state] == char:
                state += 1
            self._states[index] = state
            if state == len(pattern):
                if found is None or len(pattern) > len(self._patterns[found]):
                    found = index
                self._states[index] = borders[state - 1]
        return found

    def _reset(self) -> None:
        self._states = [0] * len(self._patterns)
        self._held = ""


def _borders(pattern: str) -> list[int]:
    """For each prefix of a pattern, the length of its longest proper border."""
    borders = [0] * len(pattern)
    length = 0
    for at in range(1, len(pattern)):
        while length and pattern[at] != pattern[length]:
            length = borders[length - 1]
        if pattern[at] == pattern[length]:
            length += 1
        borders[at] = length
    return borders
