"""Pictures, sounds, videos and documents: fetched by one guarded module, decoded under budgets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from opsin.media.limits import DEFAULT_LIMITS, FLAGS, Deadline, MediaLimits

if TYPE_CHECKING:
    from opsin.media.audio import load_audio
    from opsin.media.document import Document, Page, load_pages
    from opsin.media.image import ImageInfo, load_image, probe_image
    from opsin.media.key import array_key, image_key
    from opsin.media.loading import Loaded, MediaTiming, load
    from opsin.media.sampling import Video, VideoInfo, uniform_indices
    from opsin.media.video import load_video

__all__ = [
    "DEFAULT_LIMITS",
    "FLAGS",
    "Deadline",
    "MediaLimits",
    "Loaded",
    "MediaTiming",
    "load",
    "ImageInfo",
    "load_image",
    "probe_image",
    "load_audio",
    "Document",
    "Page",
    "load_pages",
    "Video",
    "VideoInfo",
    "load_video",
    "uniform_indices",
    "array_key",
    "image_key",
]

# Each decoder's libraries load when it is first used: start-up pays for none of them.
_HOMES = {
    "Loaded": "loading",
    "MediaTiming": "loading",
    "load": "loading",
    "ImageInfo": "image",
    "load_image": "image",
    "probe_image": "image",
    "load_audio": "audio",
    "Document": "document",
    "Page": "document",
    "load_pages": "document",
    "Video": "sampling",
    "VideoInfo": "sampling",
    "uniform_indices": "sampling",
    "load_video": "video",
    "array_key": "key",
    "image_key": "key",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
