"""How many prompt tokens a step may take, so that no step keeps the others waiting for long."""

from __future__ import annotations

LONGEST_SECONDS = 1.0  # a step of prompts only: what arrives meanwhile waits for its end
SHARED_SECONDS = 0.25  # a step in which other requests generate, no fewer than prompts wait
FIRST_TOKENS = 256  # of such a step, before any was timed
LEAST_TOKENS = 128  # below this a step's fixed costs would outweigh its work
COUNTED_TOKENS = 32  # fewer say more of a step's fixed costs than of its speed


class Pace:
    """The tokens of a step, at most `most`, by the speed of earlier steps.

    A slow step may have been disturbed: speed falls by a fifth at a time, and rises at once.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.tokens_per_second: float | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from a step of so many tokens."""
        if tokens < COUNTED_TOKENS or seconds <= 0:
            return
        measured = tokens / seconds
        known = self.tokens_per_second
        self.tokens_per_second = measured if known is None else max(measured, 0.8 * known)

    def seconds(self, tokens: int) -> float:
        """What so many tokens should take; 0 before any were timed."""
        return tokens / self.tokens_per_second if self.tokens_per_second else 0.0

    def budget(self, generating: int, prompts: int) -> int:
        """Prompt tokens of the next step, in which some requests generate and prompts wait.

        A longer step holds up the ones, and soon lets the others generate along with them: all
        together they take far less time.
        """
        if self.tokens_per_second is None:
            return min(self.most, FIRST_TOKENS) if generating else self.most
        seconds = LONGEST_SECONDS
        if generating:
            seconds = min(seconds, SHARED_SECONDS * max(1.0, prompts / generating))
        return min(self.most, max(LEAST_TOKENS, int(self.tokens_per_second * seconds)))
