"""Boxes, points and pages out of answers, and drawing them on the pictures."""

from __future__ import annotations

from opsin.grounding.drawing import draw
from opsin.grounding.layout import Element, Layout
from opsin.grounding.parsing import parse
from opsin.grounding.patch_points import draw_points_on_image, extract_points_from_text
from opsin.grounding.regions import Box, Point, Polygon, Region
from opsin.types import Frame, Grounding

__all__ = [
    "Box",
    "Point",
    "Polygon",
    "Region",
    "Frame",
    "Grounding",
    "parse",
    "draw",
    "Element",
    "Layout",
    "draw_points_on_image",
    "extract_points_from_text",
]
