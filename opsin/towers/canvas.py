"""Pictures cut into equal square tiles: the arrangement that fits best, and the size within it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_canvas(
    size: tuple[int, int], side: int, arrangements: Sequence[tuple[int, int]], *, fill: bool = False
) -> tuple[int, int]:
    """The arrangement (rows, columns) of tiles of `side` pixels for a picture of (width, height).

    It is the one that enlarges the picture least (with `fill`, most), or, where none is large
    enough, shrinks it least; of equals the smallest, then the first.
    """
    width, height = size
    scales = [min(rows * side / height, columns * side / width) for rows, columns in arrangements]
    enlarging = [scale for scale in scales if scale >= 1]
    if not enlarging:
        chosen = max(scales)
    else:
        chosen = max(enlarging) if fill else min(enlarging)
    pairs = zip(arrangements, scales, strict=True)
    equals = [arrangement for arrangement, scale in pairs if scale == chosen]
    return min(equals, key=math.prod)


def fitted_size(size: tuple[int, int], limits: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) with the picture's proportions that touches the limits from inside."""
    width, height = size
    across, down = limits[0] / width, limits[1] / height
    if across < down:
        return limits[0], max(min(math.floor(height * across), limits[1]), 1)
    return max(min(math.floor(width * down), limits[0]), 1), limits[1]


def size_on_canvas(size: tuple[int, int], canvas: tuple[int, int], side: int) -> tuple[int, int]:
    """The picture's size on a canvas (width, height): enlarged to one tile's side at most."""
    limits = [min(max(own, side), whole) for own, whole in zip(size, canvas, strict=True)]
    return fitted_size(size, (limits[0], limits[1]))


def by_proportion(most: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of at most `most` tiles, those of one proportion together."""
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for count in range(most, 0, -1):
        for rows in range(1, count + 1):
            if count % rows == 0:
                columns = count // rows
                by_ratio.setdefault(rows / columns, []).append((rows, columns))
    return [pair for pairs in by_ratio.values() for pair in pairs]
