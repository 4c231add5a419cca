"""OpenAI's transcriptions: a sound in a form to a request, deltas to text."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from opsin.errors import InputError
from opsin.server.multipart import FormPart
from opsin.server.request import Answer, Delta, Head, Request
from opsin.types import Media, Message, SamplingParams, Text

FORMATS = ("json", "text")
FIELDS = ("file", "model", "language", "prompt", "response_format", "temperature", "stream")
HARMLESS = ("include[]", "chunking_strategy", "user")
INSTRUCTION = "Transcribe this audio word for word. Write the transcript and nothing else."


@dataclass(frozen=True, slots=True)
class Transcription:
    """A parsed form."""

    request: Request
    response_format: str


def parse(parts: list[FormPart], max_tokens: int) -> Transcription:
    """The request that a form makes; InputError names the field that is wrong."""
    fields: dict[str, FormPart] = {}
    for part in parts:
        if part.name not in (*FIELDS, *HARMLESS):
            raise InputError(f"Unknown field {part.name}", remedy="Leave it out", param=part.name)
        fields[part.name] = part
    if "file" not in fields or not fields["file"].data:
        raise InputError("There is no sound in the form", param="file")

    def text(name: str) -> str:
        return fields[name].text.strip() if name in fields else ""

    form = text("response_format") or "json"
    if form not in FORMATS:
        raise InputError(
            f"response_format {form[:40]!r} is not available",
            why="no timestamps are made",
            remedy=f"Use {' or '.join(FORMATS)}",
            param="response_format",
        )
    asked = INSTRUCTION
    if text("language"):
        asked += f" The language is {text('language')[:40]}."
    if text("prompt"):
        asked += f" Context: {text('prompt')[:4000]}"
    content = (Media("audio", fields["file"].data), Text(asked))
    request = Request(
        model=text("model")[:512] or "default",
        sampling=SamplingParams(max_tokens=max_tokens, temperature=_temperature(text)),
        messages=(Message("user", content),),
        stream=text("stream").lower() in ("true", "1"),
    )
    return Transcription(request, form)


def _temperature(text: Any) -> float:
    given = text("temperature")
    try:
        value = float(given or 0)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise InputError("temperature lies between 0 and 2", param="temperature")
    return value


def usage(answer: Answer) -> dict[str, Any]:
    """Token counts as transcriptions state them."""
    held = answer.usage
    audio = held.media_tokens.get("audio", 0)
    return {
        "type": "tokens",
        "input_tokens": held.prompt_tokens,
        "input_token_details": {
            "audio_tokens": audio,
            "text_tokens": held.prompt_tokens - audio,
        },
        "output_tokens": held.generation_tokens,
        "total_tokens": held.prompt_tokens + held.generation_tokens,
    }


def render(answer: Answer) -> dict[str, Any]:
    """The reply in one piece."""
    return {"text": answer.text.strip(), "usage": usage(answer)}


class EventRenderer:
    """Deltas to the events of a streamed transcription."""

    def __init__(self, head: Head) -> None:
        del head
        self.answer = Answer()

    def opening(self) -> list[dict[str, Any]]:
        """Nothing is said before the first words."""
        return []

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """The words that came."""
        self.answer.add(dataclasses.replace(delta, index=0))
        return [{"type": "transcript.text.delta", "delta": delta.text}] if delta.text else []

    def closing(self) -> list[dict[str, Any]]:
        """The whole transcript."""
        done = {"type": "transcript.text.done", "text": self.answer.text.strip()}
        return [{**done, "usage": usage(self.answer)}]


def text_of(body: bytes | memoryview) -> str:
    """The transcript alone, of a reply in one piece."""
    text: str = json.loads(bytes(body))["text"]
    return text
