"""Points as tokens that name a patch of the picture, a part of the patch and a ninth of the part:
`<POINT_276> <POINT_727> <POINT_731> 1`.

What the numbers mean depends on the pictures of the request. Its pointing metadata says which
parts a patch has (`token_pooling` (patches, parts), -1 where there is none), where each part lies
(`subpatch_mapping`, one grid (rows, columns) for each picture), and how large the pictures are
(`image_sizes`, width and height).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opsin.grounding.drawing import draw
from opsin.grounding.regions import Point, Region

_TOKEN = re.compile(
    r"<POINT_([0-9]{1,9})> ?<POINT_([0-9]{1,9})>(?: ?<POINT_([0-9]{1,9})>)? ?([0-9]{1,9})"
    r"|>([^<>]*)</points?>"
)
NINTHS = 3
# The authors' code steps by 0.33 of a part, not by a third.
STEP = 0.33

PointTuple = tuple[int, int, float, float]  # object, picture, x, y


def parse(
    text: str,
    metadata: Mapping[str, Any] | None = None,
    *,
    no_more_points_class: bool = True,
    patch_location: str | None = "3x3",
) -> list[Region]:
    """The points of a text in pixels of the original pictures; none without the metadata.

    `no_more_points_class`: the model has a number after the patches that ends a list;
    `patch_location`: it names the ninth of a part, else the part's middle is meant.
    """
    if metadata is None:
        return []
    finder = _Finder(metadata, no_more_points_class, patch_location is not None)
    found: list[Point] = []
    unnamed = 0
    for token in _TOKEN.finditer(text):
        if token[5] is not None:
            named = [dataclasses.replace(p, label=token[5].strip()) for p in found[unnamed:]]
            found[unnamed:] = named
            unnamed = len(found)
            continue
        numbers = [int(number) if number else None for number in token.groups()[:3]]
        place = finder.place(*numbers)
        if place is not None:
            index, x, y = place
            size = finder.sizes[index]
            found.append(Point(x, y, image_index=index, object_id=int(token[4]), image_size=size))
    return list(found)


class _Finder:
    """Where the parts of one request's pictures lie."""

    def __init__(self, metadata: Mapping[str, Any], no_more: bool, ninths: bool) -> None:
        pooling = np.asarray(metadata["token_pooling"])
        self.pooling = pooling.reshape(-1, pooling.shape[-1])
        self.first_part = len(self.pooling) + int(no_more)
        self.first_ninth = self.first_part + self.pooling.shape[-1]
        self.ninths = ninths
        self.grids = [np.asarray(grid) for grid in metadata["subpatch_mapping"]]
        self.sizes = [(int(w), int(h)) for w, h in metadata["image_sizes"]]
        self.places = self._places()

    def _places(self) -> dict[int, tuple[int, int, int]]:
        """Part -> (picture, row, column), for the parts that stand once in a picture's grid."""
        places: dict[int, tuple[int, int, int]] = {}
        for index, grid in enumerate(self.grids):
            parts, firsts, counts = np.unique(grid, return_index=True, return_counts=True)
            for part, first, count in zip(parts, firsts, counts, strict=True):
                if part >= 0 and count == 1:
                    row, column = divmod(int(first), grid.shape[1])
                    places.setdefault(int(part), (index, row, column))
        return places

    def place(
        self, patch: int | None, part: int | None, ninth: int | None
    ) -> tuple[int, float, float] | None:
        """(picture, x, y) in pixels of the original, or None for numbers that name no place."""
        if patch is None or part is None:
            return None
        row, column = patch, part - self.first_part
        if not (row < self.pooling.shape[0] and 0 <= column < self.pooling.shape[1]):
            return None
        found = self.places.get(int(self.pooling[row, column]))
        if found is None:
            return None
        across = down = 0.5
        if self.ninths:
            cell = -1 if ninth is None else ninth - self.first_ninth
            if not 0 <= cell < NINTHS**2:
                return None
            across, down = ((cell_axis + 0.5) * STEP for cell_axis in divmod(cell, NINTHS))
        index, y, x = found
        grid, (width, height) = self.grids[index], self.sizes[index]
        return index, (x + across) / grid.shape[1] * width, (y + down) / grid.shape[0] * height


def joined_metadata(parts: list[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One request's metadata from that of its pictures, whose parts each count from 0."""
    if not parts:
        return None
    poolings, grids, sizes, first = [], [], [], 0
    for metadata in parts:
        pooling = np.asarray(metadata["token_pooling"])
        pooling = pooling.reshape(-1, pooling.shape[-1])
        own = [np.asarray(grid) for grid in metadata["subpatch_mapping"]]
        poolings.append(np.where(pooling < 0, pooling, pooling + first))
        grids += [np.where(grid < 0, grid, grid + first) for grid in own]
        sizes += list(metadata["image_sizes"])
        first += 1 + max(int(array.max(initial=-1)) for array in (pooling, *own))
    return {
        "token_pooling": np.concatenate(poolings),
        "subpatch_mapping": grids,
        "image_sizes": sizes,
    }


def extract_points_from_text(
    text: str,
    pointing_metadata: Mapping[str, Any],
    no_more_points_class: bool = True,
    patch_location: str | None = "3x3",
) -> list[PointTuple]:
    """The points of a text as (object, picture, x, y), x and y in pixels of the originals."""
    points = parse(
        text,
        pointing_metadata,
        no_more_points_class=no_more_points_class,
        patch_location=patch_location,
    )
    return [(p.object_id or 0, p.image_index, *p.points[0]) for p in points]


def draw_points_on_image(
    image: str | Path | Image.Image, points: list[PointTuple], out: str | Path | None = None
) -> Image.Image:
    """Draw points, as `extract_points_from_text` gives them, on a picture or a picture file.

    All are drawn, whichever picture they name. The result is saved to `out` if that is given.
    """
    if isinstance(image, Image.Image):
        picture = image
    else:
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
    drawn = draw(picture, [Point(x, y, object_id=number) for number, _, x, y in points])
    if out is not None:
        drawn.save(out)
    return drawn
