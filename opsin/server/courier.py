"""Carries events from engine threads to the event loop, waking it once a step."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any


class Courier:
    """`send` from any thread; the receiver is called in the loop's thread, in order.

    Waking a loop writes to a pipe: with many streams, one write a step instead of one a token.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._pending = False

    def send(self, receive: Callable[[Any], None], item: Any) -> None:
        """Have `receive(item)` called in the loop; nothing happens once the loop is closed."""
        self._items.append((receive, item))
        if self._pending or self._loop.is_closed():
            return
        self._pending = True
        self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Before the first item is taken: one added from now on asks for another delivery.
        self._pending = False
        while self._items:
            receive, item = self._items.popleft()
            receive(item)
