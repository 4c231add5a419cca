"""Pictures to the tensors that towers take: resize, normalise, cut into patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def resize(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """The picture at exactly width x height, by one of Pillow's filters (its integer code)."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling(resample))


def normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An RGB picture as (3, height, width) float32: (value / 255 - mean) / std."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    shift = torch.tensor(mean).mul(255.0)[:, None, None]
    scale = torch.tensor(std).mul(255.0).reciprocal()[:, None, None]
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).sub_(shift).mul_(scale)


def normalisation(config: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    """A processor config's mean and deviation; CLIP's where it states none."""
    if config.get("do_normalize", True) is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)


def patchify(pixels: Tensor, patch: int, merge: int = 1) -> Tensor:
    """(channels, height, width) to (patches, channels * patch * patch), merge blocks kept
    together.
    """
    channels, height, width = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    grid = pixels.view(channels, rows, merge, patch, columns, merge, patch)
    return grid.permute(1, 4, 2, 5, 0, 3, 6).reshape(rows * columns * merge**2, -1)
