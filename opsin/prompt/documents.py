"""Puts the pages of documents into a conversation, as the pictures that models take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opsin.media.cancellation import Cancellation
from opsin.media.document import is_pdf
from opsin.media.limits import MediaLimits
from opsin.media.loading import load
from opsin.types import Media, Message, Part, Text, Timings


def is_document(item: Media) -> bool:
    """Whether a medium is to be taken page by page: a document, or a PDF given as a picture."""
    return item.kind == "document" or (item.kind == "image" and is_pdf(item.source))


def with_pages(
    messages: Sequence[Message],
    limits: MediaLimits,
    timings: Timings,
    cancellation: Cancellation | None = None,
) -> tuple[Message, ...]:
    """The messages with every document replaced by pictures of its pages, numbered in `options`.

    All documents together have at most `max_pages` of the limits. Raises MediaError or a subclass.
    """
    left = _Allowance(limits, limits.max_pages, timings, cancellation)
    return tuple(
        replace(message, content=tuple(part for held in message.content for part in left.of(held)))
        for message in messages
    )


def pages_of(
    media: Sequence[Media],
    limits: MediaLimits,
    timings: Timings,
    cancellation: Cancellation | None = None,
) -> list[Media]:
    """The media with every document replaced by pictures of its pages, as `with_pages` does."""
    (message,) = with_pages([Message("user", tuple(media))], limits, timings, cancellation)
    return list(message.media)


class _Allowance:
    """How many pages the documents that are left may have; counts the seconds they take."""

    def __init__(
        self,
        limits: MediaLimits,
        pages: int,
        timings: Timings,
        cancellation: Cancellation | None,
    ) -> None:
        self.cancellation = cancellation
        self.limits = limits
        self.pages = pages
        self.timings = timings

    def of(self, part: Part) -> Sequence[Part]:
        """A part as it is, or the pages of a document."""
        if isinstance(part, Text) or not is_document(part):
            return (part,)
        options = {key: part.options[key] for key in ("dpi", "pages") if key in part.options}
        document = Media("document", part.source, options)
        loaded = load(document, self.limits, cancellation=self.cancellation)
        self.timings.fetch += loaded.timing.fetch
        self.timings.decode += loaded.timing.decode
        self.pages -= len(loaded.value)
        if self.pages < 0:
            amount = f"{self.limits.max_pages - self.pages:,} pages"
            raise self.limits.exceeded("max_pages", "The documents' sum", amount, "pages")
        return [Media("image", page.image, {"page": page.number}) for page in loaded.value]
