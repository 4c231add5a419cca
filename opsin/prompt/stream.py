"""Splits a stream of text into answer, reasoning and tool calls, by the tags around them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from opsin.prompt.matching import Match, StreamMatcher

Kind: TypeAlias = Literal["text", "reasoning", "tool_call"]


@dataclass(frozen=True, slots=True)
class Tag:
    """A pair of strings around a block; a block without a closing string goes on to the end."""

    kind: Kind
    start: str
    end: str = ""


# Long texts are looked at in pieces of so many characters, since what follows a tag is copied.
_PIECE = 4096

THINK = Tag("reasoning", "<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text of one kind.

    `block` counts the runs of one kind from 0, so that two tool calls in a row are told apart;
    `done` marks the last piece of a tagged block, whose closing string was seen (or needs none).
    """

    kind: Kind
    text: str
    block: int
    done: bool = False


class StreamSplitter:
    """Takes text as it comes and gives it out by kind, without the tags.

    Inside a block only its own closing string counts. `inside` is the block that the prompt's
    template has already opened (`open_tag` finds it).
    """

    def __init__(self, tags: Sequence[Tag], inside: Tag | None = None) -> None:
        self._tags = tuple(tags)
        self._opening = StreamMatcher([tag.start for tag in self._tags])
        blocks = [tag for tag in (*tags, inside) if tag is not None and tag.end]
        self._closing = {tag: StreamMatcher([tag.end]) for tag in blocks}
        self._inside = inside
        self._block = 0

    def push(self, text: str) -> list[Segment]:
        """The segments that this text completes or carries on."""
        segments: list[Segment] = []
        for start in range(0, len(text), _PIECE):
            self._add_piece(segments, text[start : start + _PIECE])
        return segments

    def _add_piece(self, segments: list[Segment], text: str) -> None:
        rest: str | None = text
        while rest is not None:
            matcher = self._matcher()
            safe, match = (rest, None) if matcher is None else matcher.push(rest)
            if match is None:
                self._give(segments, safe)
                rest = None
            else:
                self._cross(segments, match)
                rest = match.rest

    def finish(self) -> list[Segment]:
        """What was held back, and the end of a block that needs no closing string."""
        matcher = self._matcher()
        held = matcher.finish() if matcher is not None else ""
        segments: list[Segment] = []
        open_ended = self._inside is not None and not self._inside.end
        self._give(segments, held, done=open_ended)
        return segments

    def _matcher(self) -> StreamMatcher | None:
        """What looks for the next tag, if there can be one."""
        return self._opening if self._inside is None else self._closing.get(self._inside)

    def _cross(self, segments: list[Segment], match: Match) -> None:
        """Leave the run before a tag for the one after it."""
        was_inside = self._inside is not None
        self._give(segments, match.before, done=was_inside)
        self._inside = None if was_inside else self._tags[match.index]
        self._block += 1

    def _give(self, segments: list[Segment], text: str, done: bool = False) -> None:
        kind: Kind = "text" if self._inside is None else self._inside.kind
        if text or done:
            segments.append(Segment(kind, text, self._block, done))


def open_tag(prompt: str, tags: Sequence[Tag]) -> Tag | None:
    """The block that a prompt ends just inside of, if its template opened one."""
    ending = prompt.rstrip()
    return next((tag for tag in tags if ending.endswith(tag.start)), None)


def split(text: str, tags: Sequence[Tag], inside: Tag | None = None) -> list[Segment]:
    """The segments of a whole text, one for each run."""
    splitter = StreamSplitter(tags, inside)
    return splitter.push(text) + splitter.finish()
