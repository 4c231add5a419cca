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
    """One picture, sound, video or document inside a message, not yet fetched or decoded.

    `source` is whatever the user gave: a path, an http(s) or data URL, bytes, a PIL image, an
    array. A document becomes pictures of its pages before a prompt is made of it.
    """

    kind: Literal["image", "audio", "video", "document"]
    source: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def modality(self) -> str:
        """What a model must take to be given it: a document is seen as pictures."""
        return "image" if self.kind == "document" else self.kind


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
    presence and frequency penalties of 0 are off. No run of `no_repeat_ngram_size` tokens comes
    twice within the last `no_repeat_ngram_window`; None is the model's own habit, and a size of 0
    is off. `logprobs` is None (off) or how many of the most
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
    no_repeat_ngram_size: int | None = None
    no_repeat_ngram_window: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Constraint:
    """What form an answer must have.

    kind: "json_object", "json_schema" (value: the schema), "regex", "grammar" (Lark) or "choice"
    (value: the texts). `param` is the field that asked for it.
    """

    kind: Literal["json_object", "json_schema", "regex", "grammar", "choice"]
    value: Any = None
    param: str = "response_format"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool, or a piece of one: the first piece has an id and a name.

    `arguments` is JSON text; the pieces of a call, told by its `index` in the answer, add up to it.
    """

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


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
    """Token counts of one request; the cached and media tokens are part of `prompt_tokens`.

    drafted_tokens: guesses that were computed where an engine speculates; accepted_tokens: those
    that were right, part of `generation_tokens`.
    """

    prompt_tokens: int = 0
    generation_tokens: int = 0
    cached_tokens: int = 0
    media_tokens: Mapping[str, int] = field(default_factory=dict)
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """What one step did for one request: new text and tokens, and, at the end, why it ended.

    `text` never holds a stop string or half a character. The last event of every request has a
    `finish_reason`; if that is "error", `error` says why, and if a stop string ended it,
    `stop_string` is that one. Where one event holds a whole answer, `ends` says how much of the
    text, in characters, was there with each token.
    """

    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    timings: Timings | None = None
    error: Exception | None = None
    stop_string: str | None = None
    ends: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the picture that a tower sees lies on the original one.

    width, height: the seen picture in its own pixels. left, top, right, bottom: the part of the
    original that it shows, as fractions of the original's sides: 0, 0, 1, 1 is all of it (a plain
    resize), a crop lies inside, and padding reaches outside.
    """

    width: float
    height: float
    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0

    @classmethod
    def padded(cls, canvas: tuple[int, int], placed: tuple[float, float, float, float]) -> Frame:
        """A canvas (width, height) that holds the whole picture at x1, y1, x2, y2."""
        x1, y1, x2, y2 = placed
        wide, high = x2 - x1, y2 - y1
        return cls(
            *canvas,
            left=-x1 / wide,
            top=-y1 / high,
            right=(canvas[0] - x1) / wide,
            bottom=(canvas[1] - y1) / high,
        )


@dataclass(frozen=True, slots=True)
class Grounding:
    """How a model writes boxes and points: a syntax of `opsin.grounding` and its unit.

    `span` is what a whole side counts as (1000 for coordinates in 0-1000); None means pixels of the
    picture that the tower sees.
    """

    syntax: str
    span: float | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """Something a model was trained to do: the prompt that asks for it and how the answer reads.

    `{text}` in the prompt stands for what the user names. `grounding` says how this task's answers
    write regions where that is not the family's usual way; `layout` that the answer is a page.
    """

    prompt: str
    about: str = ""
    grounding: tuple[Grounding, ...] = ()
    layout: bool = False

    @property
    def takes_text(self) -> bool:
        """Whether the user has to name something."""
        return "{text}" in self.prompt

    def render(self, text: str = "") -> str:
        """The prompt with the user's words in it."""
        return self.prompt.replace("{text}", text)
