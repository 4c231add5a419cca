"""Boxes as pairs in tags: `<|object_ref_start|>cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)
<|box_end|>`.

The tags are special tokens that decoding may have dropped: then the text before the pairs is the
label.
"""

from __future__ import annotations

import re

from opsin.grounding.ref_det import plain
from opsin.grounding.regions import Region, shape_of

_TAG = re.compile(r"<\|(object_ref|box|quad|point)_(start|end)\|>")
_NUMBER = r"(-?[0-9]{1,12}+(?:\.[0-9]{1,12}+)?)"
_PAIR = re.compile(rf"\(\s*+{_NUMBER}\s*+,\s*+{_NUMBER}\s*+\)")
_BETWEEN = re.compile(r"[\s,]*+")
_PER_SHAPE = {"point": 1, "box": 2, "quad": 4}


def parse(text: str) -> list[Region]:
    """The regions of a text, in the units it is written in."""
    if _TAG.search(text) is None:
        return untagged(text)
    found: list[Region] = []
    label, mode, done = "", "", 0
    for tag in [*_TAG.finditer(text), None]:
        piece = text[done : tag.start() if tag else len(text)]
        if mode == "object_ref" or (tag and tag[1] == "object_ref" and tag[2] == "end"):
            label = plain(piece)
        elif mode:
            found += shapes(_PAIR.findall(piece), _PER_SHAPE[mode], label)
        mode = tag[1] if tag and tag[2] == "start" else ""
        done = tag.end() if tag else done
    return found


def shapes(pairs: list[tuple[str, str]], per_shape: int, label: str) -> list[Region]:
    """Regions of so many pairs each; what is left over at the end is incomplete."""
    numbers = [float(value) for pair in pairs for value in pair]
    size = 2 * per_shape
    chunks = [numbers[i : i + size] for i in range(0, len(numbers) - size + 1, size)]
    return [region for chunk in chunks if (region := shape_of(chunk, label=label)) is not None]


def untagged(text: str) -> list[Region]:
    """Regions of a text whose tags are gone: runs of two pairs, each after its label."""
    found: list[Region] = []
    run: list[tuple[str, str]] = []
    label, done = "", 0
    for pair in _PAIR.finditer(text):
        gap = _BETWEEN.match(text, done)
        if not run or gap is None or gap.end() != pair.start():
            found += shapes(run, 2, label)
            label, run = plain(text[done : pair.start()]).lstrip(",;. \n"), []
        run.append((pair[1], pair[2]))
        done = pair.end()
    return found + shapes(run, 2, label)
