"""Ends a stream of text at the first stop string, of which no part gets out before."""

from collections.abc import Sequence

from opsin.prompt.matching import StreamMatcher


class StopMatcher:
    """Passes text on until a stop string is complete.

    The stop string that is complete first counts, and of several the longest. `matched` is that
    string once there is one; it is given out only with `include_stop`.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stop for stop in stops if stop))
        self._include_stop = include_stop
        self._matcher = StreamMatcher(self._stops)
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; everything after it is dropped."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """The text that may be given out now."""
        if self.stopped:
            return ""
        if not self._stops:
            return text
        safe, match = self._matcher.push(text)
        if match is None:
            return safe
        self.matched = self._stops[match.index]
        return match.before + self.matched if self._include_stop else match.before

    def finish(self) -> str:
        """At the end of the stream: what was held back, since no stop string came of it."""
        return "" if self.stopped else self._matcher.finish()
