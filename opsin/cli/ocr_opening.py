"""Opens the first document of `opsin ocr` beside the loading of the model."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor

from opsin.cli.ocr_sources import Source
from opsin.errors import OpsinError
from opsin.media.document import Document


class Opening:
    """A document being opened; whoever takes it closes it. Leaving closes one that nobody took."""

    def __init__(self, source: Source | None) -> None:
        """With None there is nothing to open beforehand."""
        self.source = source
        self._document: Future[Document] | None = None
        if source is not None:
            thread = ThreadPoolExecutor(1, "opsin-opening")
            self._document = thread.submit(Document, source.path)
            thread.shutdown(wait=False)

    def take(self, source: Source) -> Document:
        """A document, opened now if it is not the one that was; raises OpsinError."""
        held = self._document
        if held is None or source is not self.source:
            return Document(source.path)
        self._document = None
        return held.result()

    def __enter__(self) -> Opening:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._document is not None:
            with contextlib.suppress(OpsinError):
                self._document.result().close()
