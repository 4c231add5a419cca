"""Reads an answer's text as it comes: reasoning, tool calls, and what is left to say."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from opsin.prompt.stream import Segment, StreamSplitter, Tag
from opsin.prompt.tools.dialect import CallArguments, CallStart, Reader, TextPiece, ToolEvent
from opsin.types import Event, ToolCall


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


class AnswerReader:
    """Takes the text of one answer in pieces of any size and tells its parts apart.

    tags: the blocks of reasoning there may be; opened: the one that the prompt ends inside of.
    calls: what reads tool calls, None where text is text. With `one_block`, as where a grammar
    rules what follows, reasoning stands before the answer or nowhere.
    """

    def __init__(
        self,
        tags: Sequence[Tag] = (),
        opened: Tag | None = None,
        calls: Reader | None = None,
        *,
        one_block: bool = False,
    ) -> None:
        self._splitter = StreamSplitter(tags, opened) if tags else None
        self._calls = calls
        self._one_block = one_block
        self._trim = opened is not None  # a block's first line ends are the template's, not words
        self.reasons = opened is not None
        self.num_calls = 0

    def push(self, text: str, *, last: bool = False) -> Piece:
        """The parts that this text completes or carries on; `last`: no more will come."""
        segments = self._segments(text, last)
        said: list[str] = []
        thought: list[str] = []
        events: list[ToolEvent] = []
        for segment in segments:
            held = self._trimmed(segment)
            if segment.kind == "reasoning":
                thought.append(held)
            elif self._calls is None:
                said.append(held)
            else:
                events += self._calls.feed(held)
        if last and self._calls is not None:
            events += self._calls.finish()
        calls = self._read(events, said)
        return Piece("".join(said), "".join(thought), tuple(calls))

    def take(self, event: Event) -> tuple[Piece, int]:
        """The parts of an event's text, and how many of its tokens are reasoning.

        A whole answer in one event is read token by token, as it was written: a block that opens
        behind an answer that has a form is part of it.
        """
        last = event.finish_reason is not None
        if self._splitter is None or not event.ends:
            piece = self.push(event.text, last=last)
            return piece, len(event.token_ids) if self.reasons else 0
        ends = [*event.ends, len(event.text)][: len(event.token_ids)]  # its end is no text's
        pieces: list[Piece] = []
        count = start = 0
        for end in ends[:-1]:
            pieces.append(self.push(event.text[start:end]))
            count += self.reasons
            start = end
        pieces.append(self.push(event.text[start:], last=last))
        return _together(pieces), count + self.reasons

    def _segments(self, text: str, last: bool) -> list[Segment]:
        if self._splitter is None:
            return [Segment("text", text, 0)] if text else []
        segments = self._splitter.push(text)
        if last:
            return segments + self._splitter.finish()
        answered = any(s.kind == "text" and s.text.strip() for s in segments)
        if self._one_block and answered:
            segments += self._splitter.finish()
            self._splitter = None
        return segments

    def _trimmed(self, segment: Segment) -> str:
        """A segment's text without the line ends that only set blocks apart."""
        reasons = segment.kind == "reasoning"
        if reasons != self.reasons:
            self._trim = True
        held = segment.text.lstrip("\n") if self._trim else segment.text
        self._trim = (self._trim and not held) or segment.done
        self.reasons = reasons and not segment.done
        return held

    def _read(self, events: Sequence[ToolEvent], said: list[str]) -> list[ToolCall]:
        """The pieces of calls among a reader's events; texts go to `said`."""
        calls: list[ToolCall] = []
        for event in events:
            if isinstance(event, TextPiece):
                said.append(event.text)
            elif isinstance(event, CallStart):
                calls.append(ToolCall(event.index, f"call_{secrets.token_hex(12)}", event.name))
                self.num_calls += 1
            elif isinstance(event, CallArguments):
                last = calls[-1] if calls else None
                if last is not None and last.index == event.index:
                    calls[-1] = _longer(last, event.fragment)
                else:
                    calls.append(ToolCall(event.index, arguments=event.fragment))
        return calls


def _together(pieces: Sequence[Piece]) -> Piece:
    calls = tuple(call for piece in pieces for call in piece.calls)
    text = "".join([piece.text for piece in pieces])
    return Piece(text, "".join([piece.reasoning for piece in pieces]), calls)


def _longer(call: ToolCall, fragment: str) -> ToolCall:
    return ToolCall(call.index, call.id, call.name, call.arguments + fragment)


def joined(calls: Sequence[ToolCall], piece: ToolCall) -> list[ToolCall]:
    """The calls so far with one more piece."""
    if piece.index == len(calls):
        return [*calls, piece]
    held = calls[piece.index]
    more = ToolCall(
        held.index, held.id or piece.id, held.name or piece.name, held.arguments + piece.arguments
    )
    return [*calls[: piece.index], more, *calls[piece.index + 1 :]]
