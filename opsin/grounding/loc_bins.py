"""Regions as location bins after their label: `cat<loc_102><loc_205><loc_512><loc_900>dog<loc_...`.

A bin stands for its middle, each side of the picture having a thousand. Four bins are a box, eight
a quadrangle around a line of text, and other numbers an outline, with `<poly>` between several;
the task decides, and where it is not known, what the numbers can be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from opsin.grounding.regions import Region, shape_of

_TOKEN = re.compile(r"<loc_([0-9]{1,6})>|<(/?)(poly|sep|s|pad|and|ground|od|box)>")


def parse(text: str) -> list[Region]:
    """The regions, told apart by their numbers: boxes if all can be, else quadrangles, outlines."""
    found: list[Region] = []
    for label, parts in phrases(text):
        flat = [value for part in parts for value in part]
        if len(flat) % 4 == 0 and all(is_box(flat[i : i + 4]) for i in range(0, len(flat), 4)):
            found += chunked(flat, 4, label)
        else:
            found += outlines(label, parts)
    return found


def parse_boxes(text: str) -> list[Region]:
    """The regions of an answer that holds boxes only."""
    pairs = ((label, [v for part in parts for v in part]) for label, parts in phrases(text))
    return [region for label, flat in pairs for region in chunked(flat, 4, label)]


def parse_quads(text: str) -> list[Region]:
    """The quadrangles of an answer that holds lines of text; the label is what they say."""
    pairs = ((label, [v for part in parts for v in part]) for label, parts in phrases(text))
    return [region for label, flat in pairs for region in chunked(flat, 8, label)]


def parse_polygons(text: str) -> list[Region]:
    """The outlines of an answer that holds those only."""
    return [r for label, parts in phrases(text) for r in outlines(label, parts)]


def outlines(label: str, parts: list[list[float]]) -> list[Region]:
    """One outline for each part; a coordinate without its other is dropped."""
    shapes = (shape_of(part[: len(part) // 2 * 2], label=label) for part in parts)
    return [shape for shape in shapes if shape is not None]


def chunked(flat: list[float], size: int, label: str) -> list[Region]:
    """Regions of so many numbers each; what is left over at the end is incomplete."""
    starts = range(0, len(flat) - size + 1, size)
    shapes = (shape_of(flat[start : start + size], label=label) for start in starts)
    return [shape for shape in shapes if shape is not None]


def is_box(numbers: list[float]) -> bool:
    """Whether four numbers are an upper left and a lower right corner."""
    x1, y1, x2, y2 = numbers
    return x1 <= x2 and y1 <= y2


def phrases(text: str) -> Iterator[tuple[str, list[list[float]]]]:
    """(label, runs of bin middles) in order; runs are separated by `<poly>` or `<sep>`."""
    label, done = "", 0
    parts: list[list[float]] = [[]]
    for token in _TOKEN.finditer(text):
        between = text[done : token.start()].strip()
        if between:
            if any(parts):
                yield label, [part for part in parts if part]
                parts = [[]]
            label = between
        if token[1]:
            parts[-1].append(float(token[1]) + 0.5)
        elif token[3] in ("poly", "sep"):
            parts.append([])
        done = token.end()
    if any(parts):
        yield label, [part for part in parts if part]
