"""The syntaxes in which models write regions, by name."""

from __future__ import annotations

from collections.abc import Callable

from opsin.grounding import (
    box_tags,
    json_boxes,
    json_boxes_yx,
    json_layout,
    json_objects,
    loc_bins,
    loc_tokens,
    point_tags,
    ref_det,
)
from opsin.grounding.regions import Region

# A family's `Grounding` names one of these, or PATCH_POINTS. Each takes a text and returns regions
# in the units of the text; none raises, and each is linear in the length.
SYNTAXES: dict[str, Callable[[str], list[Region]]] = {
    "box_tags": box_tags.parse,
    "json_boxes": json_boxes.parse,
    "json_boxes_yx": json_boxes_yx.parse,
    "json_layout": json_layout.parse,
    "json_objects": json_objects.parse,
    "loc_bins": loc_bins.parse,
    "loc_bins_boxes": loc_bins.parse_boxes,
    "loc_bins_polygons": loc_bins.parse_polygons,
    "loc_bins_quads": loc_bins.parse_quads,
    "loc_tokens": loc_tokens.parse,
    "point_tags": point_tags.parse,
    "ref_det": ref_det.parse,
}

# The syntax whose numbers mean nothing without the pictures of the request.
PATCH_POINTS = "patch_points"
