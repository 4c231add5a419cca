"""Boxes in tags: `<|ref|>cat<|/ref|><|det|>[[x1, y1, x2, y2], ...]<|/det|>`, or `<ref>`, `<box>`.

What follows a closed `det` up to the next tag is the region's text: models that read pages write
it there.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from opsin.grounding.json_boxes import leading_numbers
from opsin.grounding.regions import Region, shape_of
from opsin.grounding.sloppy_json import read_values

_TAG = re.compile(r"<\|?(/?)(ref|det|box)\|?>")
_SPECIAL = re.compile(r"<(?:\|[^<>|]*\||\uff5c[^<>\uff5c]*\uff5c)>")


def parse(text: str) -> list[Region]:
    """The regions of a text, in the units it is written in."""
    found: list[Region] = []
    fresh = 0  # regions from here on wait for the text that follows them
    label, mode, done = "", "text", 0
    for tag in [*_TAG.finditer(text), None]:
        end = tag.start() if tag else len(text)
        piece = text[done:end]
        closing, name = (tag[1] == "/", tag[2]) if tag else (False, "")
        if mode == "ref" or (name == "ref" and closing):
            label = plain(piece)
        elif mode == "det":
            found += boxes(piece, label, complete=tag is not None)
        elif mode == "text":
            content = plain(piece)
            found[fresh:] = [dataclasses.replace(r, text=content) for r in found[fresh:]]
            fresh = len(found)
        mode = "text" if closing else "ref" if name == "ref" else "det"
        if name == "ref" and closing:
            mode = "after ref"
        done = tag.end() if tag else end
    return found


def boxes(text: str, label: str, *, complete: bool) -> list[Region]:
    """The boxes inside a tag: one list of numbers, or a list of such lists."""
    found: list[Region | None] = []
    waiting: list[Any] = read_values(text, complete=complete)[::-1]
    while waiting:
        value = waiting.pop()
        if not isinstance(value, list):
            continue
        inner = [item for item in value if isinstance(item, list)]
        waiting.extend(reversed(inner))
        if not inner:
            found.append(shape_of(leading_numbers(value), label=label))
    return [region for region in found if region is not None]


def plain(text: str) -> str:
    """Text without special tokens and the white space around it."""
    return _SPECIAL.sub("", text).strip()
