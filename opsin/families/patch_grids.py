"""What towers for pictures of any size are given: how large, which frames of a video, in patches.

The rules are those of the reference's processors.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from opsin.errors import MediaError
from opsin.media.sampling import Chooser, VideoInfo
from opsin.towers import pixels

# The option that bounds what a frame may cost.
CAP = "cap_pixels_per_frame"
RESAMPLING = {2: "bilinear", 3: "bicubic"}


def spaced_frames(fps: float | None, least: int, most: int, factor: int = 1) -> Chooser:
    """Frames at equal steps from the first one, `fps` a second (all when None), in whole `factor`s.

    At least `least` and at most `most` of them, if the video has as many.
    """

    def choose(info: VideoInfo) -> list[int]:
        total = info.num_frames
        wanted = float(total) if fps is None else total / info.fps * fps
        wanted = min(max(wanted, least), most // factor * factor, total // factor * factor)
        if factor > 1:
            wanted = math.floor(wanted / factor) * factor
        # As many steps as fit: a rest of a frame is one frame more.
        steps = torch.arange(0, total, total / max(wanted, 1)).int()
        return [step for step in steps.tolist() if step < total]

    return choose


def spanning_frames(fps: float, least: int, most: int) -> Chooser:
    """Frames from the first to the last, `fps` a second, at least `least` and at most `most`."""

    def choose(info: VideoInfo) -> list[int]:
        total = info.num_frames
        count = min(max(int(total / info.fps * fps), least), most, total)
        chosen: list[int] = np.linspace(0, total - 1, max(count, 1)).round().astype(int).tolist()
        return chosen

    return choose


def check_proportions(width: int, height: int) -> None:
    """Raise MediaError for a picture or frame that is too narrow."""
    if max(width, height) > 200 * min(width, height):
        raise MediaError(
            f"The picture is too narrow ({width}x{height})",
            why="this model takes pictures up to 200 times as long as wide",
            remedy="Crop it or pad it",
            param="image",
        )


def smart_resize(width: int, height: int, factor: int, limits: tuple[int, int]) -> tuple[int, int]:
    """The size nearest to the picture's whose sides are multiples of `factor` within pixel limits.

    Raises MediaError for a picture more than 200 times as long as wide, as the reference does.
    """
    check_proportions(width, height)
    low, high = limits
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > high:
        shrink = math.sqrt(width * height / high)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
    elif new_width * new_height < low:
        grow = math.sqrt(low / (width * height))
        new_width = math.ceil(width * grow / factor) * factor
        new_height = math.ceil(height * grow / factor) * factor
    return new_width, new_height


def clip_size(
    frames: int, width: int, height: int, factors: tuple[int, int], limits: tuple[int, int]
) -> tuple[int, int]:
    """The (width, height) of frames whose pixels are counted over the whole clip.

    factors: what sides, and what the number of frames, are rounded to multiples of. limits: fewest
    and most pixels of all frames together.
    """
    (factor, temporal), (low, high) = factors, limits
    if width < factor or height < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_proportions(width, height)
    rounded = [round(side / factor) * factor for side in (width, height)]
    volume = round(frames / temporal) * temporal * rounded[0] * rounded[1]
    if volume > high:
        shrink = math.sqrt(frames * height * width / high)
        rounded = [
            max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height)
        ]
    elif volume < low:
        grow = math.sqrt(low / (frames * height * width))
        rounded = [math.ceil(side * grow / factor) * factor for side in (width, height)]
    return rounded[0], rounded[1]


def capped(limits: tuple[int, int], allowed: int, frames: int = 1) -> tuple[int, int]:
    """Limits for `frames` frames, each of at most `allowed` pixels and a little over the fewest."""
    low, high = limits
    return low, max(min(high // frames, allowed), int(low * 1.05)) * frames


def whole_groups(frames: Tensor, group: int) -> Tensor:
    """Frames (frames, ...) with the last one repeated until their number is a multiple."""
    missing = -len(frames) % group
    if not missing:
        return frames
    return torch.cat((frames, frames[-1:].expand(missing, *frames.shape[1:])))


def clip_patches(values: Tensor, patch: int, merge: int, temporal: int) -> Tensor:
    """Frames (frames, channels, height, width) to patches of `temporal` frames each.

    Frame groups come one after another, merge blocks stay together, and a patch's values lie by
    channel, frame, row and column.  # (patches, channels * temporal * patch * patch)
    """
    groups = values.unflatten(0, (-1, temporal)).transpose(1, 2).flatten(1, 2)
    return pixels.patchify(groups, patch, merge)
