"""Frames of a video with the time of each written into its corner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from opsin.errors import MediaError

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
# The height of the letters as a part of the frame's shorter side, and of their edge as one of it.
LETTER, EDGE = 0.1, 0.1


def clock(seconds: float) -> str:
    """A time as it is written: `time: 00:01:07.50`."""
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    return f"time: {int(hours):02d}:{int(minutes):02d}:{rest:05.02f}"


def with_times(frames: np.ndarray, times: Sequence[float], font_file: str | None) -> np.ndarray:
    """Copies of uint8 frames (frames, height, width, 3), each with its time in black on white.

    font_file: a TrueType font; None is Pillow's own. Raises MediaError for frames too small to be
    written on.
    """
    height, width = frames.shape[1:3]
    letter = int(min(width, height) * LETTER)
    if letter < 1:
        raise MediaError(
            f"The video's frames are too small ({width}x{height})",
            why="this model reads the time of a frame from the picture itself",
            remedy=f"Send frames of at least {round(1 / LETTER)} pixels",
            param="video",
        )
    font = ImageFont.truetype(font_file, letter) if font_file else ImageFont.load_default(letter)
    written = []
    for frame, seconds in zip(frames, times, strict=True):
        image = Image.fromarray(frame)
        ImageDraw.Draw(image).text(
            (0, 0),
            clock(seconds),
            font=font,
            fill=BLACK,
            stroke_width=int(letter * EDGE),
            stroke_fill=WHITE,
        )
        written.append(np.asarray(image))
    return np.stack(written)
