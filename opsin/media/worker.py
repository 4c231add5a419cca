"""Runs one fetch or decode under a deadline, in a thread that is left behind if it hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from opsin.errors import MediaTimeout
from opsin.media.limits import Deadline

T = TypeVar("T")

MAX_LEFT_BEHIND = 16


class Workers:
    """Daemon threads, one per piece of work: about 0.1 ms each, and none holds up the exit.

    Decoders are C code that no thread can interrupt, so work that outlives its deadline is left to
    end by itself, and so is work that was cancelled. Only `max_left_behind` such threads may exist;
    until one ends, work is refused.
    """

    def __init__(self, max_left_behind: int = MAX_LEFT_BEHIND) -> None:
        self.max_left_behind = max_left_behind
        self._left_behind: set[threading.Thread] = set()
        self._lock = threading.Lock()

    def left_behind(self) -> int:
        """How many threads still work on media whose caller has given up."""
        with self._lock:
            self._left_behind = {each for each in self._left_behind if each.is_alive()}
            return len(self._left_behind)

    def run(self, work: Callable[[], T], deadline: Deadline, what: str) -> T:
        """The result of `work()`, or MediaTimeout at the deadline; its exceptions come through."""
        deadline.check(what)
        if self.left_behind() >= self.max_left_behind:
            raise MediaTimeout(
                f"{what} was not decoded",
                why=f"{self.max_left_behind} earlier media items outlived their deadline and "
                "are still being decoded",
                remedy="Try again later",
            )
        result: Future[T] = Future()
        over = threading.Event()  # the work has ended, or is not wanted any more

        def body() -> None:
            try:
                result.set_result(work())
            except BaseException as error:  # noqa: BLE001  the caller raises it
                result.set_exception(error)
            finally:
                over.set()

        thread = threading.Thread(target=body, name="opsin-media", daemon=True)
        thread.start()
        with deadline.cancellation.ending(over.set):
            over.wait(deadline.remaining())
        if result.done():
            return result.result()
        with self._lock:
            self._left_behind.add(thread)
        raise deadline.expired(what)


WORKERS = Workers()
