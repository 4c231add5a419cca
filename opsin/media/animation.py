"""Animated GIF, WebP and PNG as videos: timing from the container, frames composed by Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from opsin.errors import MediaError
from opsin.media.image import corrupt_as_media_error, open_checked
from opsin.media.limits import Deadline, MediaLimits
from opsin.media.pixels import to_rgb
from opsin.media.sampling import Chooser, Video, VideoInfo, check_choice
from opsin.media.source import Opened

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Browsers show frames that ask for 10 ms or less for 100 ms; files rely on it.
SHORTEST_DELAY = 0.01
DEFAULT_DELAY = 0.1


def decode_animation(
    opened: Opened, choose: Chooser, limits: MediaLimits, deadline: Deadline
) -> Video:
    """The chosen frames of a GIF, WebP or PNG; a still picture is a video of one frame."""
    import numpy as np

    limits.check("max_bytes", opened.size, opened.name, "bytes")
    with corrupt_as_media_error(opened.name):
        image = open_checked(opened, limits)
        delays, skipped = _delays(opened, image.format or "", deadline)
        starts = (0.0, *accumulate(delays))
        fps = len(delays) / starts[-1]
        info = VideoInfo(len(delays), fps, starts[-1], image.width, image.height, starts[:-1])
        chosen = check_choice(choose(info), info, limits, opened.name)
        frames = np.empty((len(chosen), info.height, info.width, 3), np.uint8)
        rows: dict[int, list[int]] = {}
        for row, index in enumerate(chosen):
            rows.setdefault(index, []).append(row)
        for index in range(chosen[-1] + 1):
            deadline.check(opened.name)
            if len(delays) > 1:
                image.seek(index + skipped)
            if index in rows:
                frames[rows[index]] = _frame(to_rgb(image), info, opened.name)
    return Video(frames, tuple(starts[index] for index in chosen), chosen, info)


def _frame(picture: Image.Image, info: VideoInfo, name: str) -> np.ndarray:
    import numpy as np

    pixels = np.asarray(picture)
    if pixels.shape != (info.height, info.width, 3):
        raise MediaError(
            f"{name} cannot be decoded",
            why="a frame is larger than the size its header states",
            remedy="Save it again",
        )
    return pixels


def _delays(opened: Opened, name: str, deadline: Deadline) -> tuple[list[float], int]:
    """Seconds each frame is shown, and how many leading frames are no part of the animation."""
    opened.file.seek(0)
    data = opened.file.read()
    scan = {"GIF": _gif_delays, "WEBP": _webp_delays, "PNG": _png_delays}.get(name)
    delays: list[float] = []
    for delay in scan(data) if scan else ():
        if len(delays) % 4096 == 0:
            deadline.check(opened.name)
        delays.append(delay if delay > SHORTEST_DELAY else DEFAULT_DELAY)
    skipped = int(name == "PNG" and len(delays) > 0 and _default_image_apart(data))
    return delays or [DEFAULT_DELAY], skipped


def _gif_delays(data: bytes) -> Iterator[float]:
    at = 13 + _colours(data[10:11])
    delay = 0.0
    while at < len(data):
        kind = data[at]
        if kind == 0x21:
            if data[at + 1 : at + 3] == b"\xf9\x04":
                delay = int.from_bytes(data[at + 4 : at + 6], "little") / 100
            at = _skip_blocks(data, at + 2)
        elif kind == 0x2C:
            at = _skip_blocks(data, at + 11 + _colours(data[at + 9 : at + 10]))
            yield delay
            delay = 0.0
        elif kind == 0x3B:
            return
        else:
            at += 1


def _colours(flags: bytes) -> int:
    """Bytes of the colour table that a flag byte announces."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _skip_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += data[at] + 1
    return at + 1


def _webp_delays(data: bytes) -> Iterator[float]:
    at = 12
    while at + 8 <= len(data):
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"ANMF":
            yield int.from_bytes(data[at + 20 : at + 23], "little") / 1000
        at += 8 + size + size % 2


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    at = 8
    while at + 12 <= len(data):
        yield data[at + 4 : at + 8], at + 8
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _png_delays(data: bytes) -> Iterator[float]:
    for kind, at in _png_chunks(data):
        if kind == b"fcTL":
            top = int.from_bytes(data[at + 20 : at + 22], "big")
            bottom = int.from_bytes(data[at + 22 : at + 24], "big")
            yield top / (bottom or 100)


def _default_image_apart(data: bytes) -> bool:
    kinds = (kind for kind, _ in _png_chunks(data) if kind in (b"fcTL", b"IDAT"))
    return next(kinds, b"") == b"IDAT"
