"""Boxes and points as JSON: `[{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}]` and its kin.

Read are lists (`bbox_2d`, `bbox`, `box`, `point_2d`, `point`, `polygon`), named coordinates
(`x_min`, `x1`, `left`, ...), and bare lists of four numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from opsin.grounding.regions import Region, shape_of
from opsin.grounding.sloppy_json import read_values

BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box", "bounding_box")
POINT_KEYS = ("point_2d", "point", "points_2d", "points")
OUTLINE_KEYS = ("polygon", "quad", "poly")
CORNER_KEYS = (
    ("x_min", "y_min", "x_max", "y_max"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
)
LABEL_KEYS = ("label", "name", "object", "class", "element", "caption", "description")
TEXT_KEYS = ("text", "text_content", "content", "ocr")
CATEGORY_KEYS = ("category", "type")
SCORE_KEYS = ("score", "confidence")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]*)?")
# A coordinate this long is noise; longer runs of digits cost more to read than they are worth.
_DIGITS = 32


def parse(text: str) -> list[Region]:
    """The regions of a text, in the units it is written in."""
    return [region for entry in entries(text) for region in regions(entry, shapes(entry))]


def entries(text: str) -> Iterator[dict[str, Any]]:
    """Every object of a text, outer before inner; a bare list of four numbers counts as one."""
    waiting = read_values(text)[::-1]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(v for key, v in reversed(value.items()) if holds_objects(key, v))
        elif isinstance(value, list):
            if len(value) == 4 and all(type(item) is float for item in value):
                yield {"bbox": value}
            else:
                waiting.extend(reversed(value))


def holds_objects(key: str, value: Any) -> bool:
    """Whether a value of an object is worth a look: numbers there are not bare boxes."""
    if isinstance(value, list):
        return any(isinstance(item, dict) for item in value)
    return isinstance(value, dict) and key not in BOX_KEYS


def regions(entry: Mapping[str, Any], coordinates: Iterable[list[float]]) -> list[Region]:
    """The regions that one object describes: usually one, more for a list of boxes."""
    said = {
        "label": first_text(entry, LABEL_KEYS),
        "text": first_text(entry, TEXT_KEYS),
        "category": first_text(entry, CATEGORY_KEYS),
        "score": score(entry),
        "image_index": image_index(entry),
    }
    found = (shape_of(numbers, **said) for numbers in coordinates)
    return [region for region in found if region is not None]


def shapes(entry: Mapping[str, Any]) -> list[list[float]]:
    """The flat coordinate lists (x, y, x, y, ...) of one object; those that lost a number are not
    among them.
    """
    for keys, sizes in ((BOX_KEYS, (4, 8)), (POINT_KEYS, (2,)), (OUTLINE_KEYS, None)):
        for key in keys:
            value = entry.get(key)
            if isinstance(value, str):
                value = [float(part[:_DIGITS]) for part in _NUMBER.findall(value)]
            if isinstance(value, dict):
                return named_corners(value)
            if isinstance(value, list):
                found = lists_of_numbers(value)
                if sizes is None:
                    found = [[number for part in found for number in part]]
                return [part for part in found if sizes is None or len(part) in sizes]
    return named_corners(entry)


def named_corners(entry: Mapping[str, Any]) -> list[list[float]]:
    """A box whose coordinates have names, as a list of one; empty if there is none."""
    for keys in CORNER_KEYS:
        corners = [here for key in keys if (here := number(entry.get(key))) is not None]
        if len(corners) == 4:
            return [corners]
    return []


def lists_of_numbers(value: list[Any]) -> list[list[float]]:
    """The innermost lists of a list, each up to its first item that is no number."""
    inner = [item for item in value if isinstance(item, list)]
    if inner:
        return [leading_numbers(item) for item in inner]
    return [leading_numbers(value)]


def leading_numbers(values: list[Any]) -> list[float]:
    """The numbers at the start of a list."""
    found: list[float] = []
    for value in values:
        here = number(value)
        if here is None:
            break
        found.append(here)
    return found


def number(value: Any) -> float | None:
    """A value as a finite number, also when it was written as a string."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return value
    if isinstance(value, str) and len(value) <= _DIGITS and _NUMBER.fullmatch(value.strip()):
        return float(value)
    return None


def first_text(entry: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    """The first of several keys that holds text."""
    for key in keys:
        value = entry.get(key)
        if isinstance(value, str):
            return value.strip()
    return ""


def score(entry: Mapping[str, Any]) -> float | None:
    """How sure the model says it is."""
    values = (number(entry.get(key)) for key in SCORE_KEYS)
    return next((value for value in values if value is not None), None)


def image_index(entry: Mapping[str, Any]) -> int:
    """Which picture the object names, 0 unless it says so."""
    value = number(entry.get("image_index"))
    return int(value) if value is not None and 0 <= value < 1_000_000 else 0
