"""Pictures to the tensors that towers take: resize, normalise, cut into patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
Normalisation = tuple[Sequence[float], Sequence[float]]  # mean and deviation of each colour
# A resized picture with more pixels than this is only computed where it is kept.
MAX_WHOLE = 1 << 24


def resize(image: Image.Image, width: int, height: int, resample: int) -> Image.Image:
    """The picture at exactly width x height, by one of Pillow's filters (its integer code)."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling(resample))


def resize_frames(frames: Tensor, width: int, height: int, mode: str = "bicubic") -> Tensor:
    """Frames uint8 (frames, 3, h, w) at width x height, smoothed where they shrink.

    The reference's video processors resize tensors, not pictures: their values differ by a level
    or two from Pillow's.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    return F.interpolate(frames, (height, width), mode=mode, antialias=True, align_corners=False)


def normalised_frames(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Values uint8 (..., 3, h, w) as float32: (value / 255 - mean) / std."""
    shift = torch.tensor(mean).mul(255.0)[:, None, None].to(frames.device)
    scale = torch.tensor(std).mul(255.0).reciprocal()[:, None, None].to(frames.device)
    values = frames.to(torch.float32, memory_format=torch.contiguous_format)
    return values.sub_(shift).mul_(scale)


def resize_and_crop(
    image: Image.Image, size: tuple[int, int], crop: tuple[int, int], resample: int
) -> Image.Image:
    """The middle `crop` (width, height) of the picture at `size`; what lies outside it is black.

    Of a long narrow picture only the part that is kept is computed; Pillow places that in single
    precision, so that a value may round the other way.
    """
    left, top = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    if size[0] * size[1] <= MAX_WHOLE:
        whole = resize(image, *size, resample)
        return whole.crop((left, top, left + crop[0], top + crop[1]))
    kept = (max(left, 0), max(top, 0), min(left + crop[0], size[0]), min(top + crop[1], size[1]))
    across, down = image.width / size[0], image.height / size[1]
    end = min(kept[2] * across, image.width), min(kept[3] * down, image.height)
    box = (kept[0] * across, kept[1] * down, *end)
    new_size = (kept[2] - kept[0], kept[3] - kept[1])
    part = image.resize(new_size, Image.Resampling(resample), box=box)
    left, top = min(left, 0), min(top, 0)
    return part.crop((left, top, left + crop[0], top + crop[1]))


def shortest_edge_size(width: int, height: int, edge: int) -> tuple[int, int]:
    """The (width, height) of the picture scaled so that its shorter side is `edge`."""
    if width <= height:
        return edge, int(edge * height / width)
    return int(edge * width / height), edge


def padded_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square as large as its longer side."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def framed(image: Image.Image, config: Mapping[str, Any]) -> Image.Image:
    """The picture as CLIP's and SigLIP's processors resize and crop it.

    `size` is one edge, {"shortest_edge": n} or {"height": h, "width": w}; the middle is cut out
    where the config names a `crop_size` and does not switch it off. With `do_pad` the picture is
    first made square on the mean colour.
    """
    size, crop = config["size"], config.get("crop_size")
    if config.get("do_pad"):
        colour = tuple(int(value * 255) for value in config.get("image_mean", CLIP_MEAN))
        image = padded_square(image, colour)
    if isinstance(size, int):
        size = {"shortest_edge": size} if crop else {"height": size, "width": size}
    if "shortest_edge" in size:
        target = shortest_edge_size(*image.size, size["shortest_edge"])
    else:
        target = (size["width"], size["height"])
    window = target
    if crop and config.get("do_center_crop", True):
        window = (crop, crop) if isinstance(crop, int) else (crop["width"], crop["height"])
    return resize_and_crop(image, target, window, config.get("resample", 3))


def normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An RGB picture as (3, height, width) float32: (value / 255 - mean) / std."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return normalised_frames(pixels, mean, std)


def levels(tiles: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as they are, (tiles, 3, height, width) uint8."""
    out = torch.empty(len(tiles), 3, tiles[0].height, tiles[0].width, dtype=torch.uint8)
    for values, tile in zip(out, tiles, strict=True):
        values.copy_(torch.from_numpy(np.array(tile, dtype=np.uint8)).permute(2, 0, 1))
    return out


def normalised_tiles(
    tiles: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """RGB pictures of one size as `normalised` makes them, (tiles, 3, height, width)."""
    out = torch.empty(len(tiles), 3, tiles[0].height, tiles[0].width)
    for values, tile in zip(out, tiles, strict=True):
        values.copy_(normalised(tile, mean, std))
    return out


def normalisation(config: Mapping[str, Any]) -> Normalisation:
    """A processor config's mean and deviation; CLIP's where it states none."""
    if config.get("do_normalize", True) is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)


def patchify(pixels: Tensor, patch: int, merge: int = 1) -> Tensor:
    """(..., channels, height, width) to (patches, channels * patch * patch), merge blocks kept
    together and pictures one after another.
    """
    channels, height, width = pixels.shape[-3:]
    rows, columns = height // (patch * merge), width // (patch * merge)
    grid = pixels.reshape(-1, channels, rows, merge, patch, columns, merge, patch)
    return grid.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, channels * patch**2)
