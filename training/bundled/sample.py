"""The unit of training and of measuring: pictures, turns of questions and answers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

from training.bundled.page import Picture


@dataclass
class Turn:
    """One question and its answer; metric says how an answer is scored."""

    question: str
    answer: str
    metric: str = "exact"


@dataclass
class Sample:
    """A conversation about pictures; every question can also be asked alone."""

    kind: str
    pictures: list[Picture]
    turns: list[Turn]
    system: str | None = None
    pictures_last: bool = False  # the pictures stand after the first question, not before
    facts: dict[str, Any] = field(default_factory=dict)


def boxes_answer(found: list[tuple[list[int], str]]) -> str:
    """Qwen3-VL's form: a fenced JSON list, one box a line, thousandths of width and height."""
    if not found:
        return "```json\n[]\n```"
    rows = [
        f'\t{{"bbox_2d": [{", ".join(map(str, box))}], "label": {json.dumps(label)}}}'
        for box, label in found
    ]
    return "```json\n[\n" + ",\n".join(rows) + "\n]\n```"


def ask(rng: Random, phrasings: tuple[str, ...], **slots: str) -> str:
    """One phrasing, its slots filled, its case and closing mark varied a little."""
    question = rng.choice(phrasings).format(**slots)
    draw = rng.random()
    if draw < 0.06 and not slots:
        question = question.lower()
    elif draw < 0.12 and question[-1] in ".?":
        question = question[:-1]
    elif draw < 0.16:
        question = (
            "Please " + question[0].lower() + question[1:] if question[-1] == "." else question
        )
    return question


def pick_turns(rng: Random, turns: list[Turn], limit: int = 4) -> list[Turn]:
    """A few of the possible turns in random order."""
    count = min(len(turns), rng.choice((1, 1, 2, 2, 3, limit)))
    return rng.sample(turns, count)
