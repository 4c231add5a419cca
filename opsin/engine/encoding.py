"""Encodes media in slices between the steps of other requests, so that a big picture stalls none.

On a CPU a tower can take many seconds. There it runs in a thread of its own, but only while the
engine's thread waits for it: the two never compute at once. The tower stops wherever it calls a
module once its slice is over, which changes nothing in what it computes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import nn

from opsin.engine.runner import Runner
from opsin.engine.scheduler import Scheduled
from opsin.engine.sequence import Sequence

SLICE_SECONDS = 0.25  # of each step; as long as the prompts of others may take in one


class _Abandoned(Exception):
    """Nobody wants what is being computed."""


class Sliced:
    """One piece of work at a time over some modules, done a slice at a time."""

    def __init__(self, modules: nn.Module) -> None:
        self._modules = modules
        self._thread = ThreadPoolExecutor(1, "opsin-towers")
        self._work: Future[None] | None = None
        self._until = 0.0
        self._ended = False
        self._abandoned = False
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)

    @property
    def busy(self) -> bool:
        """Whether work has begun and not ended."""
        return self._work is not None

    def start(self, work: Callable[[], None]) -> None:
        """Begin; nothing is done before the first slice."""
        assert not self.busy
        self._ended = self._abandoned = False
        self._work = self._thread.submit(self._body, work)

    def advance(self, seconds: float) -> None:
        """Go on for so long and to the next module; raises what the work raises."""
        assert self._work is not None
        self._until = time.perf_counter() + seconds
        self._go.release()
        self._back.acquire()
        if self._ended:
            done, self._work = self._work, None
            done.result()

    def abandon(self) -> None:
        """End the work where it stands."""
        if self.busy:
            self._abandoned = True
            self.advance(0.0)

    def close(self) -> None:
        """End the thread."""
        self.abandon()
        self._thread.shutdown()

    def _body(self, work: Callable[[], None]) -> None:
        self._go.acquire()
        own = threading.get_ident()

        def stop_here(*_: object) -> None:
            if threading.get_ident() == own and time.perf_counter() >= self._until:
                self._back.release()
                self._go.acquire()
                if self._abandoned:
                    raise _Abandoned

        stops = [each.register_forward_pre_hook(stop_here) for each in self._modules.modules()]
        try:
            if not self._abandoned:
                work()
        except _Abandoned:
            pass
        finally:
            for stop in stops:
                stop.remove()
            self._ended = True
            self._back.release()


class MediaEncoder:
    """Encodes the media of a step before it runs, while the rest of it goes on."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.sliced = Sliced(runner.model.towers)
        self.on_cpu = runner.model.device.type == "cpu"
        self.sequences: list[Sequence] = []  # whose media are being encoded

    def ready(
        self, step: list[Scheduled], before_slice: Callable[[], None] = lambda: None
    ) -> list[Scheduled]:
        """Those of a step whose media are encoded, after a slice of encoding the others'.

        `before_slice` is called before that takes its time. Raises what a tower raises; `sequences`
        are then those that it fails.
        """
        if not self.on_cpu:
            return step
        lacking = [scheduled for scheduled in step if self.runner.lacks_media(scheduled)]
        if lacking and not self.sliced.busy:
            self.sequences = [scheduled.sequence for scheduled in lacking]
            now = time.perf_counter()
            for sequence in self.sequences:
                sequence.started = sequence.started or now  # its wait in the queue is over
            self.sliced.start(lambda: self._encode(lacking))
        if self.sliced.busy:
            before_slice()
            self.sliced.advance(SLICE_SECONDS)
        return [s for s in step if s not in lacking or not self.runner.lacks_media(s)]

    @torch.inference_mode()
    def _encode(self, lacking: list[Scheduled]) -> None:
        self.runner.encode_media(lacking)

    def forget(self, sequence: Sequence) -> None:
        """Go on without a sequence that has ended; with none left, the work ends too."""
        if sequence in self.sequences:
            self.sequences.remove(sequence)
            if not self.sequences:
                self.sliced.abandon()

    def close(self) -> None:
        """End what runs, and the thread."""
        self.sequences.clear()
        self.sliced.close()
