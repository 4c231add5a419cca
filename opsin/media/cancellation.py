"""Ends a piece of work from another thread, whatever it waits for, once nobody wants it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Cancellation:
    """Whether work is still wanted. Safe to call from any thread; what is cancelled stays so."""

    def __init__(self) -> None:
        self.cancelled = False
        self._enders: dict[object, Callable[[], None]] = {}
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Wake and end all that waits; what looks at it later does not start."""
        with self._lock:
            self.cancelled = True
            enders = list(self._enders.values())
            self._enders.clear()
        for end in enders:
            end()

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """While open, `end()` is what cancelling calls; at once if it was cancelled before.

        It may still be called just after this is left, so it must bear that.
        """
        key = object()
        with self._lock:
            if not self.cancelled:
                self._enders[key] = end
        if self.cancelled:
            end()
        try:
            yield
        finally:
            with self._lock:
                self._enders.pop(key, None)
