"""One call for every kind of media: fetch and decode under one deadline, each timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from opsin.errors import InputError
from opsin.media.cancellation import Cancellation
from opsin.media.failure import source_name
from opsin.media.limits import DEFAULT_LIMITS, Deadline, MediaLimits
from opsin.media.memory import Memory
from opsin.media.source import Opened
from opsin.media.worker import WORKERS
from opsin.types import Media

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from opsin.media.document import Page
    from opsin.media.sampling import Chooser, Video

    Decoded: TypeAlias = Image.Image | np.ndarray | Video | list[Page]


@dataclass(frozen=True, slots=True)
class MediaTiming:
    """Seconds: `fetch` got at the bytes (download, opening the file), `decode` is all the rest."""

    fetch: float
    decode: float


@dataclass(frozen=True, slots=True)
class Loaded:
    """Decoded media and its timing.

    value: an RGB PIL image, float32 samples (samples,), a Video, or the Pages of a document.
    """

    value: Any
    timing: MediaTiming


def load(
    media: Media,
    limits: MediaLimits = DEFAULT_LIMITS,
    memory: Memory | None = None,
    cancellation: Cancellation | None = None,
    **settings: Any,
) -> Loaded:
    """Fetch and decode one media part of a message, unless `memory` knows what comes of it.

    settings, by kind: audio `sample_rate`; video `fps`, `max_frames`, `choose`, as `load_audio` and
    `load_video` take them. For a video, `fps` and `max_frames` in `media.options` come first, and
    a document's `dpi` and `pages` are found there; other options are facts for the prompt and the
    processor, and are not read here. Raises MediaError or a subclass, MediaTimeout when cancelled.
    """
    deadline = Deadline(limits.deadline, cancellation)
    decode: Callable[[Any], Decoded]
    if media.kind == "image":
        decode = partial(_image, limits=limits, deadline=deadline, **settings)
    elif media.kind == "audio":
        decode = partial(_audio, limits=limits, deadline=deadline, **settings)
    elif media.kind == "video":
        asked = {key: media.options[key] for key in ("fps", "max_frames") if key in media.options}
        decode = partial(_video, limits=limits, deadline=deadline, **{**settings, **asked})
    elif media.kind == "document":
        asked = {key: media.options[key] for key in ("dpi", "pages") if key in media.options}
        decode = partial(_document, limits=limits, deadline=deadline, **asked)
    else:
        raise InputError(
            f"media of kind {str(media.kind)[:20]} is not known",
            remedy="Use image, audio, video or document",
        )

    def work() -> Any:
        if memory is None:
            return decode(media.source)
        source = memory.opened(media, limits, deadline)
        known = memory.known(source) if isinstance(source, Opened) else None
        if known is None:
            return decode(source)
        source.file.close()
        return known

    start = time.perf_counter()
    value = WORKERS.run(work, deadline, source_name(media.source, media.kind))
    spent = time.perf_counter() - start
    fetch = deadline.fetch_seconds
    return Loaded(value, MediaTiming(fetch, max(0.0, spent - fetch)))


def _image(source: Any, limits: MediaLimits, deadline: Deadline) -> Decoded:
    from opsin.media.image import decode_image

    return decode_image(source, limits, deadline)


def _document(
    source: Any,
    limits: MediaLimits,
    deadline: Deadline,
    dpi: float | None = None,
    pages: Sequence[int] | None = None,
) -> Decoded:
    from opsin.media.document import decode_pages

    return decode_pages(source, limits, deadline, dpi, pages)


def _audio(
    source: Any, limits: MediaLimits, deadline: Deadline, sample_rate: int = 16_000
) -> Decoded:
    from opsin.media.audio import decode_audio

    return decode_audio(source, sample_rate, limits, deadline)


def _video(
    source: Any,
    limits: MediaLimits,
    deadline: Deadline,
    fps: float | None = 2.0,
    max_frames: int | None = None,
    choose: Chooser | None = None,
) -> Decoded:
    from opsin.media.sampling import DEFAULT_FPS, chooser
    from opsin.media.video import decode_video

    picker = choose or chooser(fps, max_frames, limits)
    return decode_video(source, picker, limits, deadline, fps or DEFAULT_FPS)
