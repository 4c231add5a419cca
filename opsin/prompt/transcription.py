"""Asks for the words of a sound, piece by piece, and writes them down in the usual forms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsin import families
from opsin.errors import InputError, UnsupportedMedia
from opsin.families.index import MODULES
from opsin.media.cancellation import Cancellation
from opsin.media.limits import MediaLimits
from opsin.media.loading import load
from opsin.media.pauses import Piece, cut_at_pauses
from opsin.prompt.api import PromptProcessor
from opsin.types import Media, Message, Part, Text

FORMATS = ("text", "json", "verbose_json", "srt", "vtt")
TIMED = ("verbose_json", "srt", "vtt")
RATE = 16_000
# Seconds of one piece: what models that hear were trained on; shorter where times are wanted.
LONGEST = 30.0
LONGEST_TIMED = 10.0
INSTRUCTION = "Transcribe this audio word for word. Write the transcript and nothing else."
SWITCH = "transcribe"


@dataclass(frozen=True, slots=True)
class Segment:
    """The words of one piece of a sound, with its first and last moment in seconds."""

    start: float
    end: float
    text: str


def load_pieces(
    source: Any, limits: MediaLimits, longest: float, cancellation: Cancellation | None = None
) -> list[Piece]:
    """A sound at 16 kHz in pieces cut at its pauses, without the silent ones.

    Of a sound that is all silence the first piece is left. Raises MediaError or a subclass.
    """
    loaded = load(Media("audio", source), limits, None, cancellation, sample_rate=RATE)
    pieces = cut_at_pauses(loaded.value, RATE, longest)
    return [piece for piece in pieces if not piece.is_silent] or pieces[:1]


def check_hears(processor: PromptProcessor) -> None:
    """Raise UnsupportedMedia for a model that takes no sound, naming those that do."""
    takes = processor.family.modalities
    if "audio" not in takes:
        raise UnsupportedMedia(
            "This model does not take audio",
            why=f"it takes {', '.join(('text', *takes))}",
            remedy=f"Choose a model of a family that hears: {', '.join(hearing_families())}",
            param="model",
        )


def hearing_families() -> list[str]:
    """The families that take sound, each by one name."""
    return [name for name in sorted(MODULES) if "audio" in families.find(name).modalities]


def asking(
    processor: PromptProcessor, piece: Piece, language: str = "", context: str = ""
) -> tuple[tuple[Message, ...], dict[str, Any]]:
    """The conversation that asks for a piece's words, and what the chat template is given.

    A template with a switch for transcribing is asked through it, any other model in words.
    Raises InputError for a context where there is no place for words.
    """
    sound = Media("audio", (piece.samples, RATE))
    template = processor.chat_template
    if template is not None and template.mentions(SWITCH):
        if context:
            raise InputError(
                "prompt cannot be used",
                why="this model is asked for a transcript without words",
                remedy="Leave it out",
                param="prompt",
            )
        variables: dict[str, Any] = {SWITCH: True, **({"language": language} if language else {})}
        return (Message("user", (sound,)),), {"chat_template_kwargs": variables}
    words = INSTRUCTION
    words += f" The language is {language}." if language else ""
    words += f" Context: {context}" if context else ""
    content: tuple[Part, ...] = (sound, Text(words))
    return (Message("user", content),), {}


def joined(segments: Sequence[Segment]) -> str:
    """The whole transcript."""
    return " ".join(segment.text.strip() for segment in segments if segment.text.strip())


def render(segments: Sequence[Segment], form: str, language: str = "") -> str:
    """The transcript in one of FORMATS, as text."""
    if form == "srt":
        return "\n".join(_srt(segments))
    if form == "vtt":
        return "\n".join(["WEBVTT", "", *_vtt(segments)])
    if form == "text":
        return joined(segments) + "\n"
    made = {"text": joined(segments)} if form == "json" else verbose(segments, language)
    return json.dumps(made, ensure_ascii=False) + "\n"


def verbose(segments: Sequence[Segment], language: str = "") -> dict[str, Any]:
    """The transcript with the times of its pieces, as OpenAI's clients read it."""
    return {
        "task": "transcribe",
        "language": language,
        "duration": round(segments[-1].end, 3) if segments else 0.0,
        "text": joined(segments),
        "segments": [
            {
                "id": number,
                "seek": round(segment.start * 100),
                "start": round(segment.start, 3),
                "end": round(segment.end, 3),
                "text": segment.text.strip(),
            }
            for number, segment in enumerate(_spoken(segments))
        ],
    }


def _spoken(segments: Sequence[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.text.strip()]


def _srt(segments: Sequence[Segment]) -> list[str]:
    lines = []
    for number, segment in enumerate(_spoken(segments), 1):
        times = f"{clock(segment.start, ',')} --> {clock(segment.end, ',')}"
        lines += [str(number), times, _cue(segment.text), ""]
    return lines


def _vtt(segments: Sequence[Segment]) -> list[str]:
    lines = []
    for segment in _spoken(segments):
        times = f"{clock(segment.start, '.')} --> {clock(segment.end, '.')}"
        lines += [times, _cue(segment.text).replace("&", "&amp;").replace("<", "&lt;"), ""]
    return lines


def _cue(text: str) -> str:
    """Words that cannot be taken for another cue: no blank line, no arrow."""
    lines = [line.strip() for line in text.replace("-->", "->").splitlines()]
    return "\n".join(line for line in lines if line)


def clock(seconds: float, point: str) -> str:
    """hours:minutes:seconds and thousandths behind `point`."""
    whole = round(seconds * 1000)
    minutes, rest = divmod(whole, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"
