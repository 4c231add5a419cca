"""OpenAI's transcriptions: a form to a plan, a sound's pieces to requests, replies to text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsin.engine.processor import Processor
from opsin.errors import InputError
from opsin.media.cancellation import Cancellation
from opsin.media.pauses import Piece
from opsin.prompt.transcription import (
    FORMATS,
    LONGEST,
    LONGEST_TIMED,
    TIMED,
    Segment,
    asking,
    check_hears,
    joined,
    load_pieces,
    render,
    verbose,
)
from opsin.server.multipart import FormPart
from opsin.server.request import Answer, Delta, Request
from opsin.types import SamplingParams, Usage

FIELDS = ("file", "model", "language", "prompt", "response_format", "temperature", "stream")
GRANULARITIES = "timestamp_granularities[]"
HARMLESS = ("include[]", "chunking_strategy", "user")
MEDIA_TYPES = {"text": "text/plain", "srt": "text/plain", "vtt": "text/vtt"}


@dataclass(frozen=True, slots=True)
class Transcription:
    """What a form asks for."""

    sound: bytes
    model: str
    response_format: str
    language: str
    context: str
    sampling: SamplingParams
    stream: bool

    @property
    def longest(self) -> float:
        """Seconds of one piece."""
        return LONGEST_TIMED if self.response_format in TIMED else LONGEST

    def plan(self, processor: Processor, cancellation: Cancellation) -> Plan:
        """The sound in pieces, and a request for each; decodes, so it runs in a pool."""
        check_hears(processor)
        pieces = load_pieces(self.sound, processor.limits, self.longest, cancellation)
        requests = []
        for piece in pieces:
            messages, template = asking(processor, piece, self.language, self.context)
            requests.append(
                Request(
                    model=self.model,
                    sampling=self.sampling,
                    messages=messages,
                    template=template,
                    stream=self.stream,
                )
            )
        return Plan(self, pieces, requests)


@dataclass(frozen=True, slots=True)
class Plan:
    """The pieces of a sound and the requests for their words, in order."""

    asked: Transcription
    pieces: Sequence[Piece]
    requests: Sequence[Request]

    def render(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The reply in one piece; forms that are no JSON stand under "text"."""
        pairs = zip(self.pieces, answers, strict=True)
        segments = [Segment(piece.start, piece.end, answer.text) for piece, answer in pairs]
        form = self.asked.response_format
        if form == "json":
            return {"text": joined(segments), "usage": usage([a.usage for a in answers])}
        if form == "verbose_json":
            made = verbose(segments, self.asked.language)
            return {**made, "usage": usage([answer.usage for answer in answers])}
        return {"text": render(segments, form)}


def parse(parts: list[FormPart], max_tokens: int) -> Transcription:
    """What a form asks for; InputError names the field that is wrong."""
    fields: dict[str, FormPart] = {}
    for part in parts:
        if part.name == GRANULARITIES:
            _check_granularity(part.text.strip())
        elif part.name not in (*FIELDS, *HARMLESS):
            raise InputError(f"Unknown field {part.name}", remedy="Leave it out", param=part.name)
        fields[part.name] = part
    if "file" not in fields or not fields["file"].data:
        raise InputError("There is no sound in the form", param="file")

    def text(name: str) -> str:
        return fields[name].text.strip() if name in fields else ""

    form = text("response_format") or "json"
    stream = text("stream").lower() in ("true", "1")
    if form not in FORMATS or (stream and form not in ("json", "text")):
        raise InputError(
            f"response_format {form[:40]!r} is not available",
            why="a stream carries words alone" if form in FORMATS else "it is not known",
            remedy=f"Use {', '.join(FORMATS)}" if form not in FORMATS else "Leave stream out",
            param="response_format",
        )
    return Transcription(
        fields["file"].data,
        text("model")[:512] or "default",
        form,
        text("language")[:40],
        text("prompt")[:4000],
        SamplingParams(max_tokens=max_tokens, temperature=_temperature(text)),
        stream,
    )


def _check_granularity(word: str) -> None:
    if word != "segment":
        raise InputError(
            f"{GRANULARITIES} cannot be {word[:40]!r}",
            why="models here tell no times: those of a segment are where the sound was cut",
            remedy="Use segment",
            param=GRANULARITIES,
        )


def _temperature(text: Any) -> float:
    given = text("temperature")
    try:
        value = float(given or 0)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise InputError("temperature lies between 0 and 2", param="temperature")
    return value


def usage(held: Sequence[Usage]) -> dict[str, Any]:
    """Token counts of all pieces as transcriptions state them."""
    audio = sum(each.media_tokens.get("audio", 0) for each in held)
    prompt = sum(each.prompt_tokens for each in held)
    generated = sum(each.generation_tokens for each in held)
    return {
        "type": "tokens",
        "input_tokens": prompt,
        "input_token_details": {"audio_tokens": audio, "text_tokens": prompt - audio},
        "output_tokens": generated,
        "total_tokens": prompt + generated,
    }


class EventRenderer:
    """Deltas to the events of a streamed transcription; the pieces' words leave in their order."""

    def __init__(self, pieces: int) -> None:
        self.answers = [Answer() for _ in range(pieces)]
        self._next = 0
        self._sent = 0  # characters of the next piece's text that have left
        self._begun = False

    def opening(self) -> list[dict[str, Any]]:
        """Nothing is said before the first words."""
        return []

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """The words that came, if those of all pieces before have left."""
        self.answers[delta.index].add(delta)
        words = ""
        while self._next < len(self.answers):
            answer = self.answers[self._next]
            fresh = answer.text[self._sent :]
            self._sent += len(fresh)
            if fresh and self._sent == len(fresh):
                fresh = (" " if self._begun else "") + fresh.lstrip()
            self._begun = self._begun or bool(fresh.strip())
            words += fresh
            if answer.finish_reason is None:
                break
            self._next, self._sent = self._next + 1, 0
        return [{"type": "transcript.text.delta", "delta": words}] if words else []

    def closing(self) -> list[dict[str, Any]]:
        """The whole transcript."""
        text = joined([Segment(0, 0, answer.text) for answer in self.answers])
        counted = usage([answer.usage for answer in self.answers])
        return [{"type": "transcript.text.done", "text": text, "usage": counted}]
