"""Encodes media in slices between the steps of other requests, so that a big picture stalls none.

On a CPU a tower can take many seconds. There it runs in a thread of its own while the engine's
thread waits for it, and stops wherever it calls a module once its slice is over, which changes
nothing in what it computes. Where its products are the native kernels', it also goes on while the
native stack computes prompts, each with half of the threads: two with half of them get more done
than each with all of them in turn.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import nn

from opsin.engine.runner import Runner
from opsin.engine.scheduler import Scheduled
from opsin.engine.sequence import Sequence
from opsin.kernels.cpu.library import Library

SLICE_SECONDS = 0.25  # of each step; as long as the prompts of others may take in one
# A step's prompts that take less are over before a tower got far beside them: then it costs more to
# share the threads than that gains.
BESIDE_SECONDS = 0.5


class _Abandoned(Exception):
    """Nobody wants what is being computed."""


class Sliced:
    """One piece of work at a time over some modules, done a slice at a time.

    With a native library it can also go on beside the caller, whose native calls then have half of
    the threads. Torch's operations keep theirs: some round differently with other numbers of them.
    """

    def __init__(self, modules: nn.Module, library: Library | None = None) -> None:
        self._modules = modules
        self._library = library
        self._thread = ThreadPoolExecutor(1, "opsin-towers")
        self._work: Future[None] | None = None
        self._until = 0.0
        self._beside = False
        self._resumed = 0.0
        self._seconds = 0.0  # that it last went on
        self._ended = False
        self._abandoned = False
        self._go = threading.Semaphore(0)
        self._apart = threading.Semaphore(0)
        self._back = threading.Semaphore(0)

    @property
    def busy(self) -> bool:
        """Whether work has begun whose end nobody was told of."""
        return self._work is not None

    @property
    def ended(self) -> bool:
        """Whether the next `advance` only tells how the work ended."""
        return self.busy and self._ended

    def start(self, work: Callable[[], None]) -> None:
        """Begin; nothing is done before the first slice."""
        assert not self.busy
        self._ended = self._abandoned = False
        self._work = self._thread.submit(self._body, work)

    def advance(self, seconds: float) -> None:
        """Go on for so long and to the next module; raises what the work raises."""
        assert self._work is not None
        if not self._ended:
            self._until = time.perf_counter() + seconds
            self._go.release()
            self._back.acquire()
        if self._ended:
            done, self._work = self._work, None
            done.result()

    def begin_beside(self) -> None:
        """Go on beside the caller until `end_beside`; threads are shared out on return."""
        assert self._library is not None
        assert self.busy
        assert not self._ended
        self._beside, self._until = True, math.inf
        self._go.release()
        self._apart.acquire()

    def end_beside(self) -> float:
        """Stop at the next module; for how many seconds it went on. What the work raised, the next
        `advance` tells.
        """
        self._until = 0.0
        self._back.acquire()
        self._beside = False
        return self._seconds

    def abandon(self) -> None:
        """End the work where it stands."""
        self._abandoned = True
        if self.ended:
            self._work = None
        elif self.busy:
            self.advance(0.0)

    def close(self) -> None:
        """End the thread."""
        self.abandon()
        self._thread.shutdown()

    # The rest runs in the work's thread.

    def _body(self, work: Callable[[], None]) -> None:
        self._wait()
        own = threading.get_ident()

        def stop_here(*_: object) -> None:
            if threading.get_ident() == own and time.perf_counter() >= self._until:
                self._stop()
                self._wait()
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
            self._stop()

    def _wait(self) -> None:
        """Until there is time for more."""
        self._go.acquire()
        if self._beside:
            assert self._library is not None
            self._library.set_aside(self._library.threads // 2)  # else the calls take turns
            self._apart.release()
        self._resumed = time.perf_counter()

    def _stop(self) -> None:
        self._seconds = time.perf_counter() - self._resumed
        if self._library is not None:
            self._library.set_aside(0)
        self._back.release()


class MediaEncoder:
    """Encodes the media of a step before it runs, while the rest of it goes on, and those of a
    later one beside it.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.library = runner.model.shared_library
        self.sliced = Sliced(runner.model.towers, self.library)
        self.on_cpu = runner.model.device.type == "cpu"
        self.sequences: list[Sequence] = []  # whose media are being encoded
        self._ahead: Sequence | None = None  # the one of them that needs its medium later
        self._prefilling = 0.0  # seconds of that beside its own steps
        self._beside = False  # whether that goes on beside a step
        self._was_beside = False  # whether it did beside the last one

    def ready(
        self, step: list[Scheduled], before_slice: Callable[[], None] = lambda: None
    ) -> list[Scheduled]:
        """Those of a step whose media are encoded, after a slice of encoding the others'.

        None where the last step had a tower beside it and this one has more to do: that was its
        time. `before_slice` is called before it takes its time. Raises what a tower raises;
        `sequences` are then those that it fails.
        """
        if not self.on_cpu:
            return step
        if self.sliced.ended:
            self._advance()
        lacking = [scheduled for scheduled in step if self.runner.lacks_media(scheduled)]
        if lacking and not self.sliced.busy:
            now = time.perf_counter()
            for scheduled in lacking:  # its wait in the queue is over
                scheduled.sequence.started = scheduled.sequence.started or now
            self._start([each for s in lacking for each in self.runner.lacking(s)])
        had_time, self._was_beside = self._was_beside and len(lacking) < len(step), False
        if self.sliced.busy and not had_time:
            before_slice()
            self._advance()
        if not lacking:
            return step
        return [s for s in step if s not in lacking or not self.runner.lacks_media(s)]

    def begin_beside(self, step: list[Scheduled], seconds: float) -> None:
        """Encode beside a step's layers, if it has prompts that should take so many seconds: what
        was begun, or else what the first of its sequences needs next.
        """
        if self.library is None or seconds < BESIDE_SECONDS:
            return
        if not self.sliced.busy:
            ahead = ((s.sequence, s.sequence.next_medium(s.end)) for s in step)
            wanted = next(((own, i) for own, i in ahead if i is not None), None)
            if wanted is None:
                return
            self._start([wanted])
            self._ahead = wanted[0]
        self._beside = True
        self.sliced.begin_beside()

    def end_beside(self, step: list[Scheduled]) -> bool:
        """Stop what goes on beside a step; whether anything did."""
        if not self._beside:
            return False
        self._beside, self._was_beside = False, True
        seconds = self.sliced.end_beside()
        if self._ahead is not None and any(s.sequence is self._ahead for s in step):
            self._prefilling += seconds
        return True

    def _start(self, wanted: list[tuple[Sequence, int]]) -> None:
        self.sequences = list({sequence.request_id: sequence for sequence, _ in wanted}.values())
        self._ahead, self._prefilling = None, 0.0
        self.sliced.start(lambda: self.runner.encode(wanted))

    def _advance(self) -> None:
        self.sliced.advance(SLICE_SECONDS)
        if self._ahead is not None and not self.sliced.busy:
            self._ahead.timings.encode -= self._prefilling
            self._ahead = None

    def forget(self, sequence: Sequence) -> None:
        """Go on without a sequence that has ended; with none left, the work ends too."""
        if sequence in self.sequences:
            self.sequences.remove(sequence)
            if not self.sequences:
                self._ahead = None
                self.sliced.abandon()

    def close(self) -> None:
        """End what runs, and the thread."""
        self.sequences.clear()
        self._ahead = None
        self.sliced.close()
