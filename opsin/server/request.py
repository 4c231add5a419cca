"""The one request that every protocol is parsed into, and the one stream of deltas that every
reply is rendered from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from opsin.engine.form import Wanted
from opsin.prompt.answer import joined
from opsin.types import (
    FinishReason,
    Message,
    SamplingParams,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)


@dataclass(frozen=True, slots=True)
class Request:
    """A request of any protocol.

    Either `messages` (a conversation) or `prompt` (raw text or token ids) is there. `n` answers are
    wanted. `template` are variables of the chat template, `processor` the family's picture options.
    `wanted` are the tools and the form of the answers. `task` is one of the family's own, such as
    locating things. `salt` keeps caches of different keys apart.
    """

    model: str
    sampling: SamplingParams
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    n: int = 1
    template: Mapping[str, Any] = field(default_factory=dict)
    processor: Mapping[str, Any] = field(default_factory=dict)
    wanted: Wanted = field(default_factory=Wanted)
    thinking_budget: int | None = None
    task: str | None = None
    salt: str = ""
    stream: bool = False
    include_usage: bool = False

    @property
    def has_media(self) -> bool:
        """Whether something must be fetched or decoded."""
        return any(message.media for message in self.messages)


@dataclass(frozen=True, slots=True)
class ImageSize:
    """A picture's own size, the size that the model saw, and the tokens it took; in pixels."""

    width: int
    height: int
    processed_width: int
    processed_height: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one answer; the last delta of an answer has a `finish_reason`.

    index: which of the n answers. num_tokens and num_reasoning count the tokens of this delta.
    usage, timings, images, video_frames (how many of each video were looked at) and regions (boxes
    and points in pixels, as plain values) come with the last delta.
    """

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    stop_string: str | None = None
    usage: Usage | None = None
    num_reasoning: int = 0
    timings: Timings | None = None
    images: tuple[ImageSize, ...] = ()
    video_frames: tuple[int, ...] = ()
    regions: tuple[Mapping[str, Any], ...] = ()


@dataclass(slots=True)
class Answer:
    """One whole answer: the sum of its deltas."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None
    usage: Usage = field(default_factory=Usage)
    num_reasoning: int = 0
    timings: Timings = field(default_factory=Timings)
    images: tuple[ImageSize, ...] = ()
    video_frames: tuple[int, ...] = ()
    regions: tuple[Mapping[str, Any], ...] = ()

    def add(self, delta: Delta) -> None:
        """Take one more delta."""
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.logprobs += delta.logprobs
        self.num_reasoning += delta.num_reasoning
        for call in delta.tool_calls:
            self.tool_calls = joined(self.tool_calls, call)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_string = delta.stop_string
            self.usage = delta.usage or self.usage
            self.timings = delta.timings or self.timings
            self.images = delta.images
            self.video_frames = delta.video_frames
            self.regions = delta.regions


@dataclass(frozen=True, slots=True)
class Totals:
    """Token counts of all answers to one request; the prompt is counted once."""

    prompt: int = 0
    generated: int = 0
    cached: int = 0
    image: int = 0
    audio: int = 0
    video: int = 0
    reasoning: int = 0
    drafted: int = 0
    accepted: int = 0

    @classmethod
    def of(cls, answers: list[Answer]) -> Totals:
        """The sum over the answers."""
        if not answers:
            return cls()
        first = answers[0].usage
        media = first.media_tokens
        return cls(
            first.prompt_tokens,
            sum(answer.usage.generation_tokens for answer in answers),
            max(answer.usage.cached_tokens for answer in answers),
            media.get("image", 0),
            media.get("audio", 0),
            media.get("video", 0),
            sum(answer.num_reasoning for answer in answers),
            sum(answer.usage.drafted_tokens for answer in answers),
            sum(answer.usage.accepted_tokens for answer in answers),
        )


@dataclass(frozen=True, slots=True)
class Head:
    """What every reply states about itself: its id, when it was made, and the model's name."""

    id: str
    created: int
    model: str
