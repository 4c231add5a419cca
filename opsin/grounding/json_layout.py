"""A page's layout as JSON: `[{"bbox": [x1, y1, x2, y2], "category": "Title", "text": "..."}]`."""

from __future__ import annotations

import dataclasses

from opsin.grounding import json_boxes
from opsin.grounding.regions import Region


def parse(text: str) -> list[Region]:
    """The elements in reading order; one without a category is "Text"."""
    found = json_boxes.parse(text)
    return [
        dataclasses.replace(
            region,
            category=region.category or region.label or "Text",
            label=region.label or region.category or "Text",
        )
        for region in found
    ]
