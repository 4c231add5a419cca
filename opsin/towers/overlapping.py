"""Crops of a picture that overlap: how many, where they lie, and their features put together."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def grid_for(height: int, width: int, step: int, most: int) -> tuple[int, int]:
    """Rows and columns of crops, at most `most`, for a picture of height x width.

    Both sides are counted without the part that the crops at the borders have more than `step`
    pixels. A picture that is no longer than `step` either way has one crop.
    """
    if height <= step or width <= step:
        return 1, 1
    rows, columns = math.ceil(height / step), math.ceil(width / step)
    if rows * columns > most:
        shrink = math.sqrt(most / (rows * columns))
        return max(1, math.floor(rows * shrink)), max(1, math.floor(columns * shrink))
    rows = max(math.floor(math.sqrt(most * height / width)), rows)
    columns = max(math.floor(math.sqrt(most * width / height)), columns)
    if rows * columns > most:
        if columns > rows:
            columns = math.floor(most / rows)
        else:
            rows = math.floor(most / columns)
    return max(1, rows), max(1, columns)


def cut(pixels: Tensor, grid: tuple[int, int], side: int, step: int) -> Tensor:
    """pixels (channels, height, width) to its crops, row by row: (crops, channels, side, side)."""
    windows = pixels.unfold(1, side, step).unfold(2, side, step)[:, : grid[0], : grid[1]]
    return windows.permute(1, 2, 0, 3, 4).flatten(0, 1)


def stitched(features: Tensor, grid: tuple[int, int], margins: tuple[int, int]) -> Tensor:
    """Features (crops, side, side, dim) as those of the whole picture, (height, width, dim).

    Where crops meet, each leaves out its first and last so many patches to its neighbours.
    """
    rows, columns = grid
    side = features.shape[1]
    bands = []
    for row in range(rows):
        top, bottom = _kept(row, rows, side, margins)
        parts = []
        for column in range(columns):
            left, right = _kept(column, columns, side, margins)
            parts.append(features[row * columns + column, top:bottom, left:right])
        bands.append(torch.cat(parts, dim=1))
    return torch.cat(bands)


def _kept(index: int, count: int, side: int, margins: tuple[int, int]) -> tuple[int, int]:
    """First and last patch, exclusive, that a crop gives of its side."""
    return (margins[0] if index else 0), (side if index == count - 1 else side - margins[1])
