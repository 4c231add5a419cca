"""Boxes as location tokens, the vertical first and the label after: `<loc0102><loc0205><loc0900>
<loc0512> cat ; ...`, with sixteen `<seg000>` codes where a mask is asked.
"""

from __future__ import annotations

import re

from opsin.grounding.ref_det import plain
from opsin.grounding.regions import Region, shape_of

_TOKEN = re.compile(r"<(loc|seg)([0-9]{1,4})>|;")
# What may follow a label: the end of the answer, or a token that was cut off.
_END = re.compile(r"</?[a-z]{0,4}[0-9]{0,4}>?\Z")
MASK_CODES = 16


def parse(text: str) -> list[Region]:
    """The regions of a text; the tokens count a side in 1024 bins."""
    found: list[Region] = []
    locations: list[float] = []
    codes: list[int] = []
    done = 0
    for token in _TOKEN.finditer(text):
        label = text[done : token.start()]
        if label.strip() or token[0] == ";" or (token[1] == "loc" and codes):
            found += regions(locations, codes, label)
            locations, codes = [], []
        if token[1] == "loc":
            locations.append(float(token[2]))
        elif token[1] == "seg":
            codes.append(int(token[2]))
        done = token.end()
    found += regions(locations, codes, text[done:])
    # A lone pair is a point; among boxes it is one that was cut off.
    boxes = [region for region in found if region.kind == "box"]
    return boxes or found


def regions(locations: list[float], codes: list[int], label: str) -> list[Region]:
    """The boxes, or the point, of the tokens that stand before a label."""
    said = _END.sub("", plain(label)).strip()
    mask = tuple(codes) if len(codes) == MASK_CODES else ()
    shapes = []
    for start in range(0, len(locations), 4):
        part = locations[start : start + 4]
        if len(part) % 2 == 0:
            flipped = [part[i ^ 1] for i in range(len(part))]
            shapes.append(shape_of(flipped, label=said, mask_codes=mask))
    return [shape for shape in shapes if shape is not None]
