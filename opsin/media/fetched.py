"""What URLs gave, kept for a while, so that a conversation does not fetch it every turn."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from opsin.media.fetch import Fetched, fetch_unless_same
from opsin.media.limits import Deadline, MediaLimits

DEFAULT_BYTES = 2**27
FRESH_SECONDS = 60.0  # how long a body is taken for the same where its server says nothing
MOST_FRESH_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class _Kept:
    """A body, and until when it is used without asking."""

    fetched: Fetched
    fresh_until: float


class FetchedCache:
    """Bodies by salt and URL, the least recently used first to go; bounded in bytes.

    A body is used as it is for as long as its server says (an hour at most, a minute where it says
    nothing), and after that when the server, asked with the body's validators, says that it is the
    same. What a server forbids to store is not kept. Requests with different salts share nothing.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._kept: OrderedDict[tuple[bytes, str], _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, url: str, salt: bytes, limits: MediaLimits, deadline: Deadline) -> bytes:
        """The body behind a URL, fetched if need be; raises what `fetch` raises."""
        now = time.monotonic()
        with self._lock:
            kept = self._kept.get((salt, url))
            if kept is not None and now < kept.fresh_until:
                self._kept.move_to_end((salt, url))
                self.hits += 1
                return kept.fetched.body
        got = fetch_unless_same(url, limits, deadline, None if kept is None else kept.fetched)
        same = kept is not None and got.body is kept.fetched.body
        with self._lock:
            self.hits += same
            self.misses += not same
            self._keep((salt, url), got, now)
        return got.body

    def _keep(self, key: tuple[bytes, str], got: Fetched, now: float) -> None:
        old = self._kept.pop(key, None)
        if old is not None:
            self.num_bytes -= len(old.fetched.body)
        if not got.storable or len(got.body) > self.max_bytes:
            return
        seconds = FRESH_SECONDS if got.fresh_seconds is None else got.fresh_seconds
        self._kept[key] = _Kept(got, now + min(seconds, MOST_FRESH_SECONDS))
        self.num_bytes += len(got.body)
        while self.num_bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= len(oldest.fetched.body)
