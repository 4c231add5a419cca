"""Pictures small and whole, and in slices of the same area (arXiv:2403.11703)."""

from __future__ import annotations

import math

from PIL import Image

from opsin.towers import pixels


def slice_grid(size: tuple[int, int], side: int, most: int) -> tuple[int, int] | None:
    """Columns and rows of slices nearest to the picture's proportions; None if it needs none."""
    count = min(math.ceil(size[0] * size[1] / side**2), most)
    if count <= 1:
        return None
    wanted = math.log(size[0] / size[1])
    numbers = [n for n in (count - 1, count, count + 1) if 1 < n <= most]
    grids = [(m, n // m) for n in numbers for m in range(1, n + 1) if n % m == 0]
    return min(grids, key=lambda grid: abs(wanted - math.log(grid[0] / grid[1])))


def sliced_views(
    image: Image.Image, grid: tuple[int, int] | None, side: int, patch: int
) -> list[Image.Image]:
    """The picture with about side * side pixels, then its slices row by row, each as large."""
    if grid is None:
        return [pixels.resize(image, *_fitted(*image.size, side, patch, grow=True), 3)]
    small = pixels.resize(image, *_fitted(*image.size, side, patch), 3)
    columns, rows = grid
    width, height = (_whole(image.size[i], grid[i]) / grid[i] for i in (0, 1))
    across, down = _fitted(width, height, side, patch, grow=True)
    large = pixels.resize(image, across * columns, down * rows, 3)
    corners = [(j * across, i * down) for i in range(rows) for j in range(columns)]
    return [small, *(large.crop((x, y, x + across, y + down)) for x, y in corners)]


def _fitted(
    width: float, height: float, side: int, patch: int, *, grow: bool = False
) -> tuple[int, int]:
    if width * height > side**2 or grow:
        ratio = width / height
        height = int(side / math.sqrt(ratio))
        width = int(height * ratio)
    return _whole(width, patch), _whole(height, patch)


def _whole(length: float, step: int) -> int:
    return max(round(length / step) * step, step)
