"""A conversation on the page: its turns, and how they are shown and sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {
    "image": "png jpg jpeg webp gif tif tiff bmp avif heic",
    "document": "pdf",
    "audio": "wav mp3 flac ogg opus m4a aac",
    "video": "mp4 mov mkv webm avi m4v",
}
_BY_ENDING = {f".{end}": kind for kind, ends in KINDS.items() for end in ends.split()}
ENDINGS = sorted(_BY_ENDING)


@dataclass(slots=True)
class Turn:
    """What one side said. files: paths, of the user's. note: what went wrong, or why it ended."""

    role: str
    text: str = ""
    files: tuple[str, ...] = ()
    reasoning: str = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the side panel says."""

    model: str
    system: str = ""
    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    thinking: bool = False


def kind_of(path: str) -> str | None:
    """What kind of media a file is, by its ending."""
    return _BY_ENDING.get(Path(path).suffix.lower())


def messages(turns: Sequence[Turn], system: str) -> list[dict[str, Any]]:
    """The conversation as messages with paths for media; turns that failed are left out."""
    made: list[dict[str, Any]] = []
    if system.strip():
        made.append({"role": "system", "content": system.strip()})
    for turn in turns:
        if turn.role == "assistant":
            if turn.text:
                made.append({"role": "assistant", "content": turn.text})
            continue
        parts: list[dict[str, Any]] = []
        for path in turn.files:
            kind = kind_of(path) or "image"
            parts.append({"type": kind, kind: path})
        parts.append({"type": "text", "text": turn.text})
        if made and made[-1]["role"] == "user":
            made.pop()  # the turn before got no answer
        made.append({"role": "user", "content": parts})
    return made


def shown(turns: Sequence[Turn]) -> tuple[list[dict[str, Any]], list[int]]:
    """The bubbles of the page, and for each the number of its turn."""
    bubbles: list[dict[str, Any]] = []
    places: list[int] = []
    for number, turn in enumerate(turns):
        made: list[dict[str, Any]] = []
        made += [{"role": turn.role, "content": {"path": path}} for path in turn.files]
        if turn.reasoning:
            made.append(
                {
                    "role": turn.role,
                    "content": turn.reasoning,
                    "metadata": {"title": "Thinking", "status": "done" if turn.text else "pending"},
                }
            )
        if turn.text or (turn.role == "assistant" and not turn.reasoning and not turn.note):
            made.append({"role": turn.role, "content": turn.text})
        if turn.note:
            made.append({"role": turn.role, "content": f"*{turn.note}*"})
        bubbles += made
        places += [number] * len(made)
    return bubbles, places
