"""What one picture, sound or video may cost: the limits, the deadline, and their names."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opsin.errors import InputError, MediaTimeout, MediaTooLarge
from opsin.media.cancellation import Cancellation

if TYPE_CHECKING:
    import os

# The flag through which an operator sets each limit; errors name both.
FLAGS = {
    "max_bytes": "--max-media-bytes",
    "max_pixels": "--max-image-pixels",
    "max_frames": "--max-video-frames",
    "max_video_pixels": "--max-video-pixels",
    "max_pages": "--max-pages",
    "max_audio_seconds": "--max-audio-seconds",
    "deadline": "--media-timeout",
    "media_root": "--media-root",
    "allowed_domains": "--allow-media-domain",
    "allow_private_addresses": "--allow-private-media",
}


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What may be read, and how much of it, before anything is decoded.

    max_bytes: bytes of one download, data URL, bytes object or picture file. A local sound or
        video file is read piece by piece where it lies, and is not counted.
    max_pixels: width x height of one picture, and of one frame of a video.
    max_frames: frames kept of one video.
    max_video_pixels: frames kept x width x height of one video; pixels of all pages of a document.
    max_pages: pages of the documents in one prompt.
    max_audio_seconds: length of one sound.
    deadline: seconds that fetching and decoding one item may take together.
    media_root: folders that local files may be read from. None: any file the process can read (the
        command line and the Python API); an empty tuple: none (a server without `--media-root`).
    allowed_domains: hosts that may be fetched from, with their subdomains. None: any public host;
        an empty tuple: none.
    allow_private_addresses: fetch from loopback and private networks too. Only an operator sets it.
    """

    max_bytes: int = 128 * 2**20
    max_pixels: int = 2**26
    max_frames: int = 768
    max_video_pixels: int = 2**29
    max_pages: int = 64
    max_audio_seconds: float = 3600.0
    deadline: float = 60.0
    media_root: tuple[str | os.PathLike[str], ...] | None = None
    allowed_domains: tuple[str, ...] | None = None
    allow_private_addresses: bool = False

    def __post_init__(self) -> None:
        for name in (
            "max_bytes",
            "max_pixels",
            "max_frames",
            "max_video_pixels",
            "max_pages",
            "max_audio_seconds",
            "deadline",
        ):
            if not getattr(self, name) > 0:
                raise InputError(
                    f"{FLAGS[name]} must be above zero", remedy="Give a positive number", param=name
                )

    def check(self, limit: str, amount: float, what: str, unit: str) -> None:
        """Raise MediaTooLarge if `what` holds more than the named limit allows."""
        if amount > getattr(self, limit):
            raise self.exceeded(limit, what, f"{amount:,.10g} {unit}", unit)

    def exceeded(self, limit: str, what: str, amount: str, unit: str) -> MediaTooLarge:
        """The error for `what` being `amount`, over the named limit (a field of this class)."""
        return MediaTooLarge(
            f"{what} is too large",
            why=f"it has {amount}, the limit is {getattr(self, limit):,.10g} {unit}",
            remedy=f"Send a smaller one, or raise {limit} ({FLAGS[limit]})",
            param=limit,
        )


DEFAULT_LIMITS = MediaLimits()


class Deadline:
    """The time that fetching and decoding one item share, and how much of it fetching took.

    It is over at once when the work is cancelled.
    """

    def __init__(self, seconds: float, cancellation: Cancellation | None = None) -> None:
        self.seconds = seconds
        self.cancellation = cancellation or Cancellation()
        self.fetch_seconds = 0.0
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, never below zero."""
        return 0.0 if self.cancellation.cancelled else max(0.0, self._end - time.monotonic())

    def check(self, what: str) -> None:
        """Raise MediaTimeout once the time is over; `what` names the media."""
        if self.remaining() <= 0.0:
            raise self.expired(what)

    def expired(self, what: str) -> MediaTimeout:
        """The error for `what` having outlived this deadline."""
        if self.cancellation.cancelled:
            return MediaTimeout(f"{what} is not wanted any more", why="its request has ended")
        return MediaTimeout(
            f"{what} took too long",
            why=f"fetching and decoding it was not done after {self.seconds:g} seconds",
            remedy=f"Send a smaller one, or raise deadline ({FLAGS['deadline']})",
            param="deadline",
        )
