"""Pictures as a grid of equal crops and, small, the whole: which grid, and what lies where."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def crop_grid(size: tuple[int, int], side: int, most: int) -> tuple[int, int]:
    """Columns and rows of crops of `side` pixels for a picture of (width, height).

    As many as cover it, or, if those are more than `most`, the grid nearest to its proportions.
    """
    width, height = size
    columns, rows = math.ceil(width / side), math.ceil(height / side)
    if columns * rows <= most:
        return columns, rows
    grids = ((i, j) for i in range(1, most + 1) for j in range(1, most // i + 1))
    best, nearest = (1, 1), math.inf
    for grid in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - grid[0] / grid[1])
        larger = width * height > 0.5 * side**2 * grid[0] * grid[1]
        if difference < nearest or (difference == nearest and larger):
            best, nearest = grid, difference
    return best


def fitted(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) of the picture's proportions inside the target."""
    across, down = target[0] / size[0], target[1] / size[1]
    if across < down:
        return target[0], int(size[1] * across)
    return int(size[0] * down), target[1]


def crops_and_whole(
    image: Image.Image,
    grid: tuple[int, int],
    side: int,
    filled: tuple[int, int],
    shades: tuple[Sequence[float], Sequence[float]],
) -> Tensor:
    """The whole picture and its crops, row by row: (1 + crops, 3, side, side), normalised.

    The picture is resized to `filled` and lies at the top left of the grid, on white; the whole is
    that canvas made small. `shades` are mean and deviation.
    """
    values = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)[None]
    resized = F.interpolate(values, filled[::-1], mode="bilinear", antialias=True)[0]
    columns, rows = grid
    right, below = columns * side - filled[0], rows * side - filled[1]
    canvas = F.pad(resized, (0, right, 0, below), value=255).float()
    mean, deviation = (torch.tensor(shade)[:, None, None] * 255.0 for shade in shades)
    canvas = (canvas - mean) / deviation
    whole = F.interpolate(canvas[None], (side, side), mode="bicubic", align_corners=False)
    crops = canvas.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
    return torch.cat((whole, crops.flatten(0, 1)))


def crop_masks(grid: tuple[int, int], side: int, columns: int, rows: int) -> Tensor:
    """Which patches of the whole (all) and of each crop show the picture: (1 + crops, side, side).

    The grid's first `columns` and `rows` of patches do; `side` is a crop's.
    """
    shown = torch.zeros(grid[1] * side, grid[0] * side, dtype=torch.bool)
    shown[:rows, :columns] = True
    crops = shown.view(grid[1], side, grid[0], side).transpose(1, 2).flatten(0, 1)
    return torch.cat((torch.ones_like(crops[:1]), crops))


def joined(crops: Tensor, grid: tuple[int, int]) -> Tensor:
    """Crops (crops, height, width, dim) as one (rows * height, columns * width, dim)."""
    columns, rows = grid
    return crops.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
