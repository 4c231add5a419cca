"""Boxes and points as JSON with the vertical coordinate first: `{"box_2d": [y1, x1, y2, x2]}`."""

from __future__ import annotations

from opsin.grounding import json_boxes
from opsin.grounding.regions import Region


def parse(text: str) -> list[Region]:
    """The regions of a text, in the units it is written in."""
    return [region.mapped(lambda y, x: (x, y)) for region in json_boxes.parse(text)]
