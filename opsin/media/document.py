"""Reads a document, page by page, as pictures; PDF files are drawn in a process of their own.

The library that draws PDF pages is not made for threads, and its input is written by strangers:
in its own process it can be ended when it hangs, and its memory is bounded.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from opsin.errors import InputError, MediaError, UnsupportedMedia
from opsin.media.failure import source_name
from opsin.media.formats import HEADER_BYTES, image_format, not_an_image
from opsin.media.image import decode_image
from opsin.media.limits import DEFAULT_LIMITS, Deadline, MediaLimits
from opsin.media.process import WorkerProcess
from opsin.media.source import open_source
from opsin.media.worker import WORKERS

DEFAULT_DPI = 150.0
LOWEST_DPI, HIGHEST_DPI = 1.0, 2400.0
# The drawing process holds the document, what its pictures unpack to, and one drawn page.
PROCESS_MEMORY = 2 << 30
MAGIC = b"%PDF-"
# Readers take a file whose first bytes are something else, as mail programs leave them.
MAGIC_WITHIN = 1024

_GONE: dict[str, Any] = {"error": "gone"}
_WORKER = Path(__file__).with_name("pdf_worker.py")


@dataclass(frozen=True, slots=True)
class Page:
    """One page as a picture; pages are numbered from 1."""

    number: int
    image: Image.Image


def is_pdf(source: Any) -> bool:
    """Whether a source looks like a PDF by its name, media type or first bytes; nothing is read."""
    if isinstance(source, bytes | bytearray | memoryview):
        return MAGIC in bytes(source[:MAGIC_WITHIN])
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if not isinstance(source, str):
        return False
    if source[:5].lower() == "data:":
        return source[5:20].lower() == "application/pdf"
    return source.partition("#")[0].partition("?")[0].lower().endswith(".pdf")


class Document:
    """An open document: how many pages it has, and each of them as a picture.

    source: a path, an http(s), data or file URL, or bytes, of a PDF file or of a picture, which is
    a document of one page. Each call has the limit's deadline for itself, unless one is given for
    all; then the caller already runs in a worker thread. Close it when done, or use it in a `with`
    statement. Safe to call from any thread.
    """

    def __init__(
        self, source: Any, limits: MediaLimits = DEFAULT_LIMITS, deadline: Deadline | None = None
    ) -> None:
        self.limits = limits
        self.name = source_name(source, "document")
        self._source = source
        self._lock = threading.Lock()
        self._process: WorkerProcess | None = None
        self._data = b""
        self._is_pdf = False
        self._deadline = deadline
        if deadline is not None:
            self.num_pages = self._open(deadline)
            return
        fresh = Deadline(limits.deadline)
        self.num_pages = WORKERS.run(lambda: self._open(fresh), fresh, self.name)

    def __enter__(self) -> Document:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.num_pages

    def page(self, number: int, dpi: float | None = None) -> Image.Image:
        """Page `number`, counted from 1, as RGB at `dpi` dots per inch (a picture as it is).

        Raises MediaError where the page is damaged, and MediaTooLarge where it would have more
        pixels than the limits allow, which is known before it is drawn.
        """
        if not 1 <= number <= self.num_pages:
            raise InputError(
                f"{self.name} has no page {number}",
                why=f"its pages are 1 to {self.num_pages}",
                param="pages",
            )
        dots = checked_dpi(dpi)
        deadline = self._deadline or Deadline(self.limits.deadline)
        what = f"page {number} of {self.name}"
        if self._is_pdf:
            return self._draw(number, dots, deadline, what)
        if self._deadline is not None:
            return decode_image(self._data, self.limits, deadline)
        return WORKERS.run(lambda: decode_image(self._data, self.limits, deadline), deadline, what)

    def close(self) -> None:
        """Let the document go."""
        with self._lock:
            self._discard()
            self._data = b""

    def _open(self, deadline: Deadline) -> int:
        """Fetch the bytes and count the pages."""
        with open_source(self._source, "document", self.limits, deadline) as opened:
            self.name = opened.name
            self._data = opened.file.read()
        self._source = None
        self._is_pdf = MAGIC in self._data[:MAGIC_WITHIN]
        if not self._is_pdf:
            head = self._data[:HEADER_BYTES]
            if image_format(head) is None:
                raise _no_document(head, self.name)
            return 1
        with self._lock:
            pages = self._start(deadline)
        if pages < 1:
            raise MediaError(f"{self.name} has no pages", remedy="Check that the file is whole")
        return pages

    def _draw(self, number: int, dpi: float, deadline: Deadline, what: str) -> Image.Image:
        asked = {"page": number - 1, "dpi": dpi, "max_pixels": self.limits.max_pixels}
        with self._lock:
            if not self._data:
                raise MediaError(f"{what} was not drawn", why="the document is closed")
            if self._process is None:  # another page has ended it
                self._start(deadline)
            answer, pixels = self._ask(asked, deadline, what)
        size = (answer["width"], answer["height"])
        return Image.frombytes("RGB", size, pixels, "raw", "RGB", answer["stride"], 1)

    def _ask(
        self, asked: dict[str, Any] | None, deadline: Deadline, what: str
    ) -> tuple[dict[str, Any], bytes]:
        """One exchange with the process, which is ended if the deadline passes meanwhile."""
        process = self._process
        assert process is not None
        timer = threading.Timer(deadline.remaining(), process.kill)
        timer.daemon = True
        timer.start()
        try:
            with deadline.cancellation.ending(process.kill):
                if asked is not None:
                    process.send(json.dumps(asked).encode() + b"\n")
                line = process.line()
                answer: dict[str, Any] = json.loads(line) if line.endswith(b"\n") else _GONE
                pixels = process.read(answer.get("bytes", 0))
        finally:
            timer.cancel()
        if len(pixels) < answer.get("bytes", 0) or answer == _GONE:
            self._discard()
            deadline.check(what)
            answer = _GONE
        if "error" in answer:
            raise self._failure(answer, what)
        return answer, pixels

    def _failure(self, answer: dict[str, Any], what: str) -> MediaError:
        kind = answer["error"]
        if kind == "pixels":
            width, height = answer["width"], answer["height"]
            amount = f"{width}x{height} = {width * height:,} pixels"
            return self.limits.exceeded("max_pixels", what, amount, "pixels")
        if kind == "password":
            return MediaError(
                f"{what} cannot be opened",
                why="it is locked with a password",
                remedy="Save a copy without one",
            )
        reasons = {
            "size": "it states a size that no page has",
            "memory": f"it needs more than {PROCESS_MEMORY >> 20} MiB of memory",
            "gone": "it ended the process that reads it",
        }
        return MediaError(
            f"{what} cannot be decoded",
            why=reasons.get(kind, "it is damaged or incomplete"),
            remedy="Check that the whole file was sent, or print it to a new PDF",
        )

    def _start(self, deadline: Deadline) -> int:
        """Start the process and give it the document; its number of pages."""
        settings = {"memory": PROCESS_MEMORY, "size": len(self._data)}
        self._process = WorkerProcess(_WORKER, settings)
        self._process.send(self._data)
        answer, _ = self._ask(None, deadline, self.name)
        return int(answer["pages"])

    def _discard(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()


def load_pages(
    source: Any,
    limits: MediaLimits = DEFAULT_LIMITS,
    *,
    dpi: float | None = None,
    pages: Sequence[int] | None = None,
) -> list[Page]:
    """The pages of a document as pictures, in order; `pages` are the numbers wanted, from 1.

    At most `max_pages` of the limits, and together at most `max_video_pixels`. Raises MediaError
    or a subclass.
    """
    deadline = Deadline(limits.deadline)
    what = source_name(source, "document")
    return WORKERS.run(lambda: decode_pages(source, limits, deadline, dpi, pages), deadline, what)


def decode_pages(
    source: Any,
    limits: MediaLimits,
    deadline: Deadline,
    dpi: float | None = None,
    pages: Sequence[int] | None = None,
) -> list[Page]:
    """`load_pages` without its worker thread, for callers that already run in one."""
    checked_dpi(dpi)
    with Document(source, limits, deadline) as document:
        wanted = list(pages) if pages is not None else range(1, document.num_pages + 1)
        limits.check("max_pages", len(wanted), document.name, "pages")
        return list(_pages(document, wanted, dpi, deadline))


def _pages(
    document: Document, wanted: Sequence[int], dpi: float | None, deadline: Deadline
) -> Iterator[Page]:
    total = 0
    for number in wanted:
        image = document.page(number, dpi)
        total += image.width * image.height
        document.limits.check("max_video_pixels", total, document.name, "pixels on its pages")
        deadline.check(document.name)
        yield Page(number, image)


def checked_dpi(dpi: float | None) -> float:
    """The dots per inch to draw at; InputError for what is no such number."""
    if dpi is None:
        return DEFAULT_DPI
    number = isinstance(dpi, int | float) and not isinstance(dpi, bool)
    if not number or not LOWEST_DPI <= dpi <= HIGHEST_DPI:
        raise InputError(
            f"dpi cannot be {str(dpi)[:40]}",
            why=f"it lies between {LOWEST_DPI:g} and {HIGHEST_DPI:g}",
            param="dpi",
        )
    return float(dpi)


def _no_document(head: bytes, name: str) -> MediaError:
    found = not_an_image(head, name)
    return UnsupportedMedia(
        f"{name} is neither a PDF nor a picture", why=found.why, remedy="Give a PDF file"
    )
