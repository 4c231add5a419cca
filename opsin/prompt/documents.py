"""Puts pages of documents and frames of videos into a conversation, as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from opsin.media.cancellation import Cancellation
from opsin.media.document import is_pdf
from opsin.media.limits import MediaLimits
from opsin.media.loading import load
from opsin.types import Media, Message, Part, Text, Timings

# Of a video for a model that takes pictures, unless the request says how many: each costs as much
# as a picture.
MOST_FRAMES = 8
SOUND = "use_audio_in_video"  # the option of a video whose sound is heard too
NUM_FRAMES = "num_frames"  # the option of a video's first frame that says how many there are


def is_document(item: Media) -> bool:
    """Whether a medium is to be taken page by page: a document, or a PDF given as a picture."""
    return item.kind == "document" or (item.kind == "image" and is_pdf(item.source))


def is_replaced(item: Media, *, frames: bool) -> bool:
    """Whether other media take a medium's place: see `with_pages`."""
    return is_document(item) or (item.kind == "video" and (frames or SOUND in item.options))


def with_pages(
    messages: Sequence[Message],
    limits: MediaLimits,
    timings: Timings,
    cancellation: Cancellation | None = None,
    *,
    frames: bool = False,
) -> tuple[Message, ...]:
    """The messages with every document replaced by pictures of its pages, numbered in `options`.

    With `frames`, a video is replaced by pictures of its frames too; the sound of one with the
    option `use_audio_in_video` follows it. All documents together have at most `max_pages` of the
    limits. Raises MediaError or a subclass.
    """
    left = _Allowance(limits, timings, cancellation, frames, limits.max_pages)
    return tuple(
        replace(message, content=tuple(part for held in message.content for part in left.of(held)))
        for message in messages
    )


def pages_of(
    media: Sequence[Media],
    limits: MediaLimits,
    timings: Timings,
    cancellation: Cancellation | None = None,
    *,
    frames: bool = False,
) -> list[Media]:
    """The media with documents and videos replaced by pictures, as `with_pages` does."""
    messages = [Message("user", tuple(media))]
    (message,) = with_pages(messages, limits, timings, cancellation, frames=frames)
    return list(message.media)


@dataclass(slots=True)
class _Allowance:
    """How many pages the documents that are left may have; counts the seconds they take."""

    limits: MediaLimits
    timings: Timings
    cancellation: Cancellation | None
    frames: bool
    pages: int

    def of(self, part: Part) -> Sequence[Part]:
        """A part as it is, or the pages of a document, or the frames of a video."""
        if isinstance(part, Text):
            return (part,)
        if part.kind == "video":
            return self._video(part)
        return self._pages(part) if is_document(part) else (part,)

    def _video(self, video: Media) -> list[Media]:
        options = {key: value for key, value in video.options.items() if key != SOUND}
        seen = replace(video, options=options)
        heard = [Media("audio", video.source)] if video.options.get(SOUND) else []
        return [*(self._frames(seen) if self.frames else [seen]), *heard]

    def _frames(self, video: Media) -> list[Media]:
        from PIL import Image

        most = min(MOST_FRAMES, self.limits.max_frames)
        value = self._load(replace(video, options={"max_frames": most, **video.options}))
        pictures = [Media("image", Image.fromarray(frame)) for frame in value.frames]
        first = replace(pictures[0], options={NUM_FRAMES: len(pictures)})
        return [first, *pictures[1:]]

    def _load(self, media: Media) -> Any:
        loaded = load(media, self.limits, cancellation=self.cancellation)
        self.timings.fetch += loaded.timing.fetch
        self.timings.decode += loaded.timing.decode
        return loaded.value

    def _pages(self, part: Media) -> list[Media]:
        options = {key: part.options[key] for key in ("dpi", "pages") if key in part.options}
        pages = self._load(Media("document", part.source, options))
        self.pages -= len(pages)
        if self.pages < 0:
            amount = f"{self.limits.max_pages - self.pages:,} pages"
            raise self.limits.exceeded("max_pages", "The documents' sum", amount, "pages")
        return [Media("image", page.image, {"page": page.number}) for page in pages]
