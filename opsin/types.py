"""The values that travel through Opsin: messages in, sampling parameters, events and results
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import os

    import numpy as np
    from PIL import Image

    ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | np.ndarray

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Text:
    """A run of text inside a message."""

    text: str


@dataclass(frozen=True, slots=True)
class Media:
    """One picture, sound or video inside a message, not yet fetched or decoded.

    `source` is whatever the user gave: a path, an http(s) or data URL, bytes, a PIL image, an
    array.
    """

    kind: Literal["image", "audio", "video"]
    source: Any
    options: Mapping[str, Any] = field(default_factory=dict)


Part: TypeAlias = Text | Media


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation, its parts in reading order."""

    role: str
    content: tuple[Part, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """All text of the message, joined."""
        return "".join(part.text for part in self.content if isinstance(part, Text))

    @property
    def media(self) -> tuple[Media, ...]:
        """The media of the message, in order."""
        return tuple(part for part in self.content if isinstance(part, Media))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off; a repetition_penalty of 1 and
    presence and frequency penalties of 0 are off. `logprobs` is None (off) or how many of the most
    likely tokens to report beside the chosen one (0 to 20).
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A chosen token's log probability (nats), with the most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Timings:
    """Seconds spent on one request, stage by stage."""

    fetch: float = 0.0
    decode: float = 0.0
    preprocess: float = 0.0
    queue: float = 0.0
    encode: float = 0.0
    prefill: float = 0.0
    generate: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request; the cached and media tokens are part of `prompt_tokens`."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    media_tokens: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """What one step did for one request: new text and tokens, and, at the end, why it ended.

    `text` never holds a stop string or half a character. The last event of every request has a
    `finish_reason`; if that is "error", `error` says why, and if a stop string ended it,
    `stop_string` is that one.
    """

    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    timings: Timings | None = None
    error: Exception | None = None
    stop_string: str | None = None
