"""Media made ready for towers, kept so that the same bytes are not decoded and prepared again."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict

import torch
from PIL import Image

from opsin.families.base import MediaInput

DEFAULT_BYTES = 2**27


class PreparedCache:
    """Prepared media by key, the least recently used first to go; bounded in bytes.

    A key (see `prepared_key`) names the salt, the content and all settings that decide what comes
    of it. What is kept is shared by all who ask: their tensors are only read.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[bytes, MediaInput] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes, *, with_picture: bool) -> MediaInput | None:
        """A medium of one's own that shares what is kept, with the original only if asked."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or (with_picture and kept.picture is None):
                self.misses += 1
                return None
            self._kept.move_to_end(key)
            self.hits += 1
        return _own(kept, kept.picture if with_picture else None)

    def put(self, key: bytes, ready: MediaInput) -> None:
        """Keep a prepared medium, if it fits."""
        size = _num_bytes(ready)
        if size > self.max_bytes:
            return
        with self._lock:
            old = self._kept.pop(key, None)
            if old is not None:
                self.num_bytes -= _num_bytes(old)
            self._kept[key] = _own(ready, ready.picture)
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.num_bytes -= _num_bytes(oldest)


def prepared_key(salt: bytes, *facts: object) -> bytes:
    """32 bytes that name content and settings; the facts' repr must state their value."""
    head = len(salt).to_bytes(8, "big") + salt
    return hashlib.sha256(head + repr(facts).encode()).digest()


def _own(item: MediaInput, picture: Image.Image | None) -> MediaInput:
    """A copy whose places in a prompt are its own."""
    nowhere = torch.empty(0, dtype=torch.long)
    features, details = dict(item.features), dict(item.details)
    return dataclasses.replace(
        item, features=features, details=details, indices=nowhere, picture=picture
    )


def _num_bytes(item: MediaInput) -> int:
    """Memory that a prepared medium takes; a picture has three bytes a pixel."""
    picture = 0 if item.picture is None else 3 * item.picture.width * item.picture.height
    return picture + sum(tensor.nbytes for tensor in item.features.values())
