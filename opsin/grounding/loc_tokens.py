"""Boxes as location tokens, the vertical first and the label after: `<loc0102><loc0205><loc0900>
<loc0512> cat ; ...`, with sixteen `<seg000>` codes where a mask is asked.
"""

from __future__ import annotations

import re

from opsin.grounding.ref_det import plain
from opsin.grounding.regions import Region, shape_of

_TOKEN = re.compile(r"<(loc|seg)([0-9]{1,4})>|;")
MASK_CODES = 16


def parse(text: str) -> list[Region]:
    """The regions of a text; the tokens count a side in 1024 bins."""
    found: list[Region] = []
    locations: list[float] = []
    codes: list[int] = []
    done = 0

    def finish(end: int) -> None:
        label = plain(text[done:end]).removesuffix("<eos>").removesuffix("</s>").strip()
        flipped = [locations[i + 1 - 2 * (i % 2)] for i in range(len(locations) // 2 * 2)]
        mask = tuple(codes) if len(codes) == MASK_CODES else ()
        for start in range(0, len(flipped), 4):
            region = shape_of(flipped[start : start + 4], label=label, mask_codes=mask)
            # A lone pair is a point; a pair after a box is a box that was cut off.
            if region is not None and (start == 0 or region.kind == "box"):
                found.append(region)
        locations.clear()
        codes.clear()

    for token in _TOKEN.finditer(text):
        between = text[done : token.start()].strip()
        if locations and (between or token[0] == ";" or (token[1] == "loc" and codes)):
            finish(token.start())
        if token[1] == "loc":
            locations.append(float(token[2]))
        elif token[1] == "seg":
            codes.append(int(token[2]))
        done = token.end()
    if locations:
        finish(len(text))
    return found
