"""Reads a video from anything a user may give and keeps evenly spread frames of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opsin.errors import MediaError
from opsin.media.failure import source_name
from opsin.media.formats import HEADER_BYTES, image_format
from opsin.media.image import decode_image, is_array
from opsin.media.limits import DEFAULT_LIMITS, Deadline, MediaLimits
from opsin.media.pixels import array_to_rgb
from opsin.media.sampling import (
    DEFAULT_FPS,
    Chooser,
    Video,
    VideoInfo,
    check_choice,
    chooser,
)
from opsin.media.source import Opened, data_url_parts, decode_base64, open_source
from opsin.media.worker import WORKERS

if TYPE_CHECKING:
    import numpy as np


def load_video(
    source: Any,
    limits: MediaLimits = DEFAULT_LIMITS,
    *,
    fps: float | None = DEFAULT_FPS,
    max_frames: int | None = None,
    choose: Chooser | None = None,
) -> Video:
    """Frames of a video, spread evenly over the whole clip, first and last kept.

    source: a path, an http(s), data or file URL, bytes; an animated GIF, WebP or PNG; or frames: an
    array (frames, height, width[, 3]) or a list of pictures, taken as sampled at `fps` already.
    fps: frames to keep of each second; None keeps all. max_frames: at most so many, no more than
    the limit of the same name, which also holds when it is None. choose: instead of both, gives
    the frame numbers to keep, ascending, for a VideoInfo. Raises MediaError or a subclass.
    """
    deadline = Deadline(limits.deadline)
    picker = choose or chooser(fps, max_frames, limits)
    return WORKERS.run(
        lambda: decode_video(source, picker, limits, deadline, fps or DEFAULT_FPS),
        deadline,
        source_name(source, "video"),
    )


def decode_video(
    source: Any,
    choose: Chooser,
    limits: MediaLimits,
    deadline: Deadline,
    frames_per_second: float = DEFAULT_FPS,
) -> Video:
    """`load_video` without its worker thread, for callers that already run in one."""
    name = source_name(source, "video")
    if is_array(source):
        return _from_array(source, choose, limits, frames_per_second)
    if isinstance(source, list | tuple):
        return _from_pictures(source, choose, limits, deadline, frames_per_second)
    if isinstance(source, str) and source[:15].lower() == "data:video/jpeg":
        pictures = _jpeg_frames(source, name, limits)
        return _from_pictures(pictures, choose, limits, deadline, frames_per_second)
    with open_source(source, "video", limits, deadline, in_place=True) as opened:
        return _decode_opened(opened, choose, limits, deadline)


def _decode_opened(
    opened: Opened, choose: Chooser, limits: MediaLimits, deadline: Deadline
) -> Video:
    """The chosen frames of an opened file; a still picture counts as one frame."""
    opened.file.seek(0)
    head = opened.file.read(HEADER_BYTES)
    if image_format(head) is not None:
        from opsin.media.animation import decode_animation

        return decode_animation(opened, choose, limits, deadline)
    from opsin.media.container import decode_container

    return decode_container(opened, choose, limits, deadline)


def _jpeg_frames(url: str, name: str, limits: MediaLimits) -> list[bytes]:
    """The pictures of `data:video/jpeg;base64,frame,frame,...`, counted before any is decoded."""
    _, is_base64, payload = data_url_parts(url, name)
    limits.check("max_frames", payload.count(",") + 1, name, "frames")
    limits.check("max_bytes", len(payload) * 3 // 4, name, "bytes")
    if not is_base64:
        raise MediaError(
            f"{name} is not valid", why="it is not base64", remedy="Encode each frame with base64"
        )
    return [decode_base64(frame, name, limits) for frame in payload.split(",")]


def _frames_info(count: int, width: int, height: int, fps: float) -> VideoInfo:
    times = tuple(index / fps for index in range(count))
    return VideoInfo(count, fps, count / fps, width, height, times)


def _kept(
    info: VideoInfo, choose: Chooser, limits: MediaLimits, name: str
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Numbers and times of the frames kept of a video given frame by frame."""
    chosen = check_choice(choose(info), info, limits, name)
    return chosen, tuple(index / info.fps for index in chosen)


def _from_array(source: np.ndarray, choose: Chooser, limits: MediaLimits, fps: float) -> Video:
    import numpy as np

    name = source_name(source, "video")
    if source.ndim not in (3, 4) or 0 in source.shape:
        raise MediaError(
            f"{name} is no video",
            why=f"its shape is {tuple(source.shape)}",
            remedy="Give (frames, height, width, 3)",
        )
    limits.check("max_frames", len(source), name, "frames")
    first = array_to_rgb(source[0], name)
    height, width = first.shape[:2]
    limits.check("max_pixels", height * width, name, "pixels a frame")
    info = _frames_info(len(source), width, height, fps)
    chosen, times = _kept(info, choose, limits, name)
    frames = np.stack([array_to_rgb(source[index], name) for index in chosen])
    return Video(frames, times, chosen, info)


def _from_pictures(
    source: Sequence[Any], choose: Chooser, limits: MediaLimits, deadline: Deadline, fps: float
) -> Video:
    import numpy as np

    name = source_name(source, "video")
    if not source:
        raise MediaError(f"{name} is empty", why="it has 0 frames", remedy="Give its frames")
    limits.check("max_frames", len(source), name, "frames")
    first = decode_image(source[0], limits, deadline)
    info = _frames_info(len(source), first.width, first.height, fps)
    chosen, times = _kept(info, choose, limits, name)
    frames = np.empty((len(chosen), first.height, first.width, 3), np.uint8)
    for row, index in enumerate(chosen):
        deadline.check(name)
        picture = decode_image(source[index], limits, deadline) if index else first
        if picture.size != first.size:
            raise MediaError(
                f"{name} is no video",
                why=f"frame {index} is {picture.width}x{picture.height}, "
                f"the first {first.width}x{first.height}",
                remedy="Give frames of one size",
            )
        frames[row] = np.asarray(picture)
    return Video(frames, times, chosen, info)
