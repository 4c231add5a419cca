"""What a video is to the rest of the package, and which of its frames are kept."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from opsin.errors import MediaError, MediaTooLarge
from opsin.media.limits import FLAGS, MediaLimits

if TYPE_CHECKING:
    import numpy as np


DEFAULT_FPS = 2.0


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """A video before its frames are chosen.

    fps: frames per second on average; duration: seconds; size as shown, after rotation.
    timestamps: seconds of every frame from the first one's, when they are known (variable rates
    show here); None in a long file that is not read through.
    """

    num_frames: int
    fps: float
    duration: float
    width: int
    height: int
    timestamps: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Video:
    """The frames kept of a video.

    frames: uint8 RGB, (frames, height, width, 3). timestamps: seconds of each from the video's
    first frame. indices: its number among the source's frames. damaged_packets: how many pieces of
    the stream did not decode and were skipped on the way.
    """

    frames: np.ndarray
    timestamps: tuple[float, ...]
    indices: tuple[int, ...]
    info: VideoInfo
    damaged_packets: int = 0

    @property
    def fps(self) -> float:
        """Frames per second of the source."""
        return self.info.fps

    @property
    def duration(self) -> float:
        """Seconds the source lasts."""
        return self.info.duration


Chooser = Callable[[VideoInfo], Sequence[int]]


def uniform_indices(info: VideoInfo, fps: float | None, max_frames: int) -> list[int]:
    """Frame numbers spread evenly over the whole clip, its first and last frame among them.

    As many as `fps` frames per second of the clip give (every frame when None), at least two, at
    most `max_frames` and at most all. Even in time, so a variable rate does not bunch them.
    """
    total = info.num_frames
    wanted = total if fps is None else max(2, int(min(info.duration * fps, total)))
    count = min(wanted, total, max_frames)
    if count <= 1:
        return [0]
    if count == total:
        return list(range(total))
    if info.timestamps is None:
        # Half rounds up: (2ab + b) // 2b is a/b to the nearest.
        return [(2 * i * (total - 1) + count - 1) // (2 * (count - 1)) for i in range(count)]
    times = info.timestamps
    step = (times[-1] - times[0]) / (count - 1)
    nearest = {_nearest(times, times[0] + i * step) for i in range(count)}
    return sorted(nearest | {0, total - 1}) if count > 1 else [0]


def _nearest(times: Sequence[float], time: float) -> int:
    right = min(bisect_left(times, time), len(times) - 1)
    left = max(right - 1, 0)
    return left if time - times[left] < times[right] - time else right


def chooser(fps: float | None, max_frames: int | None, limits: MediaLimits) -> Chooser:
    """Uniform sampling at the asked rate and count; MediaError for absurd ones."""
    if fps is not None and not 0 < fps < 1e6:
        raise MediaError(
            "the video's fps is not usable",
            why=f"{fps:g} is not between 0 and a million",
            remedy="Give frames per second, such as 1 or 2",
            param="fps",
        )
    if max_frames is not None and max_frames < 1:
        raise MediaError(
            "the video's max_frames is not usable",
            why=f"{max_frames} is below 1",
            remedy="Give a positive number",
            param="max_frames",
        )
    if max_frames is not None and max_frames > limits.max_frames:
        raise MediaTooLarge(
            "the video's max_frames is too large",
            why=f"it is {max_frames}, the limit is {limits.max_frames} frames",
            remedy=f"Ask for fewer, or raise max_frames ({FLAGS['max_frames']})",
            param="max_frames",
        )
    count = limits.max_frames if max_frames is None else max_frames
    return lambda info: uniform_indices(info, fps, count)


def check_choice(
    indices: Sequence[int], info: VideoInfo, limits: MediaLimits, name: str
) -> tuple[int, ...]:
    """The chosen frame numbers, checked to exist, to ascend and to fit the budgets."""
    chosen = tuple(int(index) for index in indices)
    ascending = all(a <= b for a, b in pairwise(chosen))
    if not chosen or not ascending or chosen[0] < 0 or chosen[-1] >= info.num_frames:
        raise MediaError(
            f"{name} has no such frames",
            why=f"frame numbers must ascend from 0 to {info.num_frames - 1}",
            remedy="Choose other frames",
        )
    limits.check("max_frames", len(chosen), name, "frames")
    pixels = len(chosen) * info.width * info.height
    if pixels > limits.max_video_pixels:
        amount = f"{len(chosen)} frames of {info.width}x{info.height} = {pixels:,} pixels"
        raise limits.exceeded(
            "max_video_pixels", f"{name} (lower fps or max_frames)", amount, "pixels"
        )
    return chosen
