"""Work on many items at once, never more than a window holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from opsin.errors import OpsinError


@dataclass(frozen=True, slots=True)
class Done:
    """One item's end: what became of it, or what went wrong."""

    job: Any
    value: Any = None
    error: OpsinError | None = None


def windowed(jobs: Iterable[Any], work: Callable[[Any], Any], window: int) -> Iterator[Done]:
    """`work(job)` for every job, as many at once as the window holds, in the order they end.

    Jobs are drawn only when there is room. An OpsinError is an outcome; any other ends the run.
    """
    running: dict[Future[Any], Any] = {}
    pool = ThreadPoolExecutor(window, "opsin-work")

    def ended(until: int) -> Iterator[Done]:
        while len(running) > until:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, error = running.pop(future), future.exception()
                if error is None:
                    yield Done(job, future.result())
                elif isinstance(error, OpsinError):
                    yield Done(job, error=error)
                else:
                    raise error

    try:
        for job in jobs:
            running[pool.submit(work, job)] = job
            yield from ended(window - 1)
        yield from ended(0)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
