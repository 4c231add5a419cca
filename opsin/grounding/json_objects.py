"""Objects and points as JSON with named coordinates: `{"objects": [{"x_min": 0.1, "y_min": 0.2,
"x_max": 0.3, "y_max": 0.4}]}` and `{"points": [{"x": 0.5, "y": 0.5}]}`.
"""

from __future__ import annotations

from opsin.grounding.json_boxes import entries, number, regions, shapes
from opsin.grounding.regions import Region


def parse(text: str) -> list[Region]:
    """The regions of a text, in the units it is written in."""
    found: list[Region] = []
    for entry in entries(text):
        coordinates = shapes(entry)
        x, y = number(entry.get("x")), number(entry.get("y"))
        if not coordinates and x is not None and y is not None:
            coordinates = [[x, y]]
        found += regions(entry, coordinates)
    return found
