"""What the family tests ask: the same requests for the reference and for us."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from .checkpoints import Case
from .pictures import picture, sound

IMAGE = {"type": "image"}
AUDIO = {"type": "audio"}


@dataclass(frozen=True)
class Scene:
    """A request: messages with places for media, and the media that fill them in order."""

    name: str
    messages: list[dict[str, Any]]
    images: list[Image.Image] = field(default_factory=list)
    audio: list[np.ndarray] = field(default_factory=list)


def text(words: str) -> dict[str, str]:
    """A part of plain text."""
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    """A user's message."""
    return {"role": "user", "content": list(parts)}


def one_image(name: str, image: Image.Image) -> Scene:
    """One picture and a question about it."""
    return Scene(name, [user(IMAGE, text("Describe the picture in detail."))], [image])


def scenes(case: Case) -> list[Scene]:
    """Everything that a family is asked, by what it can take."""
    found: list[Scene] = []
    if case.text_only:
        found.append(Scene("text", [user(text("What do you see?"))]))
    if case.images >= 1:
        found.append(one_image("one", picture(1, 90, 70)))
        found.append(one_image("another", picture(2, 90, 70)))
    if case.large is not None:
        found.append(one_image("large", picture(14, *case.large)))
    if case.images >= 3:
        three = [picture(3, 60, 100), picture(4, 120, 48), picture(5, 33, 31)]
        found.append(
            Scene("three", [user(IMAGE, text("and"), IMAGE, IMAGE, text("Compare."))], three)
        )
    if case.two_turns and case.images:
        found.append(_two_turns(min(2, case.images)))
    if case.audio:
        found.append(Scene("sound", [user(AUDIO, text("What is said?"))], audio=[sound(8, 1.3)]))
        two = [sound(9, 0.7), sound(10, 2.1)]
        found.append(Scene("sounds", [user(AUDIO, text("then"), AUDIO, text("?"))], audio=two))
        if case.images:
            parts = user(IMAGE, AUDIO, text("Compare."))
            found.append(Scene("mixed", [parts], [picture(11, 70, 40)], [sound(12, 0.9)]))
    return found


def _two_turns(images: int) -> Scene:
    answer = {"role": "assistant", "content": [text("A red square.")]}
    second = user(IMAGE, text("And this one?")) if images > 1 else user(text("And below?"))
    messages = [user(IMAGE, text("Describe the picture in detail.")), answer, second]
    return Scene("turns", messages, [picture(6, 80, 60), picture(7, 64, 64)][:images])
