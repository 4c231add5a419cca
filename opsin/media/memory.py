"""What spares loading a medium its work: bodies fetched before, and what came of the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opsin.media.fetched import FetchedCache
from opsin.media.limits import Deadline, MediaLimits
from opsin.media.source import Opened, is_web_url, open_fetched, open_source
from opsin.types import Media

CHUNK = 2**20


@dataclass(slots=True)
class Memory:
    """What one load may use.

    `fetched` keeps the bodies of URLs, apart by `salt`. `recall` is asked with the SHA-256 of the
    encoded bytes, left in `digest`, before they are decoded; what it returns, unless None, is the
    value. Local sounds and videos are read where they lie, and have no digest.
    """

    fetched: FetchedCache
    salt: bytes
    recall: Callable[[bytes], Any | None]
    digest: bytes = b""

    def opened(self, media: Media, limits: MediaLimits, deadline: Deadline) -> Any:
        """The source, opened where its bytes can be had at once."""
        source = media.source
        if is_web_url(source):
            return open_fetched(source, media.kind, self.fetched, self.salt, limits, deadline)
        encoded = isinstance(source, bytes | bytearray | memoryview)
        named = media.kind == "image" and isinstance(source, str | os.PathLike)
        data_url = isinstance(source, str) and source[:5].lower() == "data:"
        if isinstance(source, str) and source[:15].lower() == "data:video/jpeg":
            data_url = False  # a list of pictures, not a file
        if encoded or named or data_url:
            return open_source(source, media.kind, limits, deadline)
        return source

    def known(self, opened: Opened) -> Any | None:
        """What is remembered of these bytes; the file is at its start again."""
        digest = hashlib.sha256()
        while chunk := opened.file.read(CHUNK):
            digest.update(chunk)
        opened.file.seek(0)
        self.digest = digest.digest()
        return self.recall(self.digest)
