"""One request at work: prepared, queued, computed, read; closing it ends it wherever it is."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from opsin.engine.form import AnswerForm
from opsin.engine.sampler import LogitsProcessor
from opsin.errors import EngineError, QueueFull
from opsin.families.base import Prompt
from opsin.media.cancellation import Cancellation
from opsin.prompt.stream import THINK, open_tag
from opsin.server.courier import Courier
from opsin.server.manager import Loaded
from opsin.server.metrics import Metrics
from opsin.server.preparing import Pools, prepare
from opsin.server.replies import Reader, region_finder
from opsin.server.request import Answer, Delta, Request
from opsin.server.thinking import thinking_budget
from opsin.types import Event, SamplingParams, Timings, Usage

LOOK_AT_ENGINE = 5.0  # seconds between looks at whether the engine's thread is there


class Admission:
    """How many answers may be at work or waiting at once; one more is refused."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def enter(self, count: int) -> None:
        """Take `count` places, or raise QueueFull. A single request always enters an empty room."""
        if self.held and self.held + count > self.limit:
            raise QueueFull(
                "The server has too many requests",
                why=f"{self.held} of {self.limit} places are taken",
                remedy="Try again later",
            )
        self.held += count

    def leave(self, count: int) -> None:
        """Give places back."""
        self.held -= count


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every job needs of its server."""

    pools: Pools
    courier: Courier
    admission: Admission
    metrics: Metrics


class Job:
    """The answers to one or several requests over one model.

    Use as an async context: entering prepares and queues, leaving cancels what has not ended.
    With `whole` each answer comes in one delta, at its end.
    """

    def __init__(
        self,
        shop: Workshop,
        loaded: Loaded,
        requests: Sequence[Request],
        *,
        whole: bool = False,
    ) -> None:
        self.shop = shop
        self.loaded = loaded
        self.requests = requests
        self.whole = whole
        self.prompts: list[Prompt] = []
        self._forms: list[AnswerForm] = []
        self.started = time.perf_counter()
        self.usage = Usage()
        self._places = sum(request.n for request in requests)
        self._open: dict[int, int] = {}  # answer -> the engine's id
        self._readers: list[Reader] = []
        self._ready: deque[tuple[int, Event]] = deque()
        self._arrived = asyncio.Event()
        self._latest: list[float] = []
        self._closed = False
        self._cancellation = Cancellation()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Job:
        self.shop.admission.enter(self._places)
        self.shop.metrics.in_flight.inc()
        try:
            for request in self.requests:
                self._forms.append(await self.shop.pools.form(self.loaded.processor, request))
                self.prompts.append(await self._prepare(request))
            self._submit()
            self._look()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    async def _prepare(self, request: Request) -> Prompt:
        vocabulary = self.loaded.model.decoder.config.vocab_size
        work = partial(prepare, self.loaded.processor, request, vocabulary, self._cancellation)
        return await self.shop.pools.run(request, work)

    def _submit(self) -> None:
        asked = zip(self.requests, self.prompts, self._forms, strict=True)
        for request, prompt, form in asked:
            find_regions = region_finder(self.loaded.processor, request)
            for i in range(request.n):
                answer = len(self._readers)
                self._readers.append(Reader(answer, prompt, form.reader(prompt), find_regions))
                self._latest.append(0.0)
                self._open[answer] = self.loaded.engine.submit(
                    prompt,
                    nth_sampling(form.ending(request.sampling), i),
                    self._receiver(answer),
                    self._processors(request, prompt),
                    form.guide(prompt),
                    form.keep,
                    self.whole,
                )

    def _receiver(self, answer: int) -> Callable[[Event], None]:
        def on_event(event: Event) -> None:
            self.shop.courier.send(self._arrive, (answer, event))

        return on_event

    def _processors(self, request: Request, prompt: Prompt) -> Iterable[LogitsProcessor]:
        if request.thinking_budget is None:
            return ()
        tokenizer = self.loaded.processor.tokenizer
        end = tokenizer.encode(THINK.end, add_special_tokens=False)
        opened = open_tag(prompt.text, (THINK,)) is not None
        start = [] if opened else tokenizer.encode(THINK.start, add_special_tokens=False)
        return (thinking_budget(request.thinking_budget, start, end),)

    def _arrive(self, item: tuple[int, Event]) -> None:
        """Take an event over; in the event loop's thread."""
        if not self._closed:
            self._ready.append(item)
            self._arrived.set()

    async def batches(self) -> AsyncIterator[list[Delta]]:
        """Deltas as they come, all that are there at once; ends after every answer's last.

        Raises what ended an answer early: the engine's error, or EngineError if it was closed.
        """
        while self._open or self._ready:
            await self._next_arrival()
            deltas = [self._read(answer, event) for answer, event in self._drain()]
            if deltas:
                yield deltas

    async def _next_arrival(self) -> None:
        """Return when something has arrived; EngineError if nothing can, the engine having died."""
        while not self._ready:
            self._arrived.clear()
            await self._arrived.wait()
            if not self._ready and not self.loaded.engine.alive:
                raise EngineError(
                    "The engine has ended",
                    why="a step failed in a way it was not made for",
                    remedy="Restart the server; its log says more",
                )

    def _look(self) -> None:
        """Wake who waits for an arrival every few seconds: a timeout each time would cost more."""
        self._arrived.set()
        self._timer = asyncio.get_running_loop().call_later(LOOK_AT_ENGINE, self._look)

    def _drain(self) -> list[tuple[int, Event]]:
        items = list(self._ready)
        self._ready.clear()
        return items

    def _read(self, answer: int, event: Event) -> Delta:
        self._time(answer, event)
        if event.finish_reason is not None:
            self._open.pop(answer, None)
            self._count(answer, event)
        if event.error is not None:
            raise event.error
        if event.finish_reason == "cancelled":
            raise EngineError(
                "The request was ended",
                why="the model was unloaded or the server is stopping",
                remedy="Try again later",
            )
        return self._readers[answer].push(event)

    def _time(self, answer: int, event: Event) -> None:
        """Observe when tokens came; of an answer that came whole, as far apart as on average."""
        now, metrics = time.perf_counter(), self.shop.metrics
        if not event.token_ids:
            return
        if self.whole:
            generating = 0.0 if event.timings is None else event.timings.generate
            metrics.first_token.observe(now - self.started - generating)
            for _ in event.token_ids[1:]:
                metrics.token_gap.observe(generating / (len(event.token_ids) - 1))
        elif self._latest[answer]:
            metrics.token_gap.observe(now - self._latest[answer])
        else:
            metrics.first_token.observe(now - self.started)
        self._latest[answer] = now

    def _count(self, answer: int, event: Event) -> None:
        held = Counter(item.kind for item in self.prompts[0].media) if answer == 0 else {}
        self.shop.metrics.finished(event.usage, event.timings or Timings(), held)
        self.usage = Usage(
            event.usage.prompt_tokens,
            self.usage.generation_tokens + event.usage.generation_tokens,
            event.usage.cached_tokens,
        )

    def close(self) -> None:
        """Cancel what has not ended; safe to call again."""
        if self._closed:
            return
        self._closed = True
        self._cancellation.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for engine_id in self._open.values():
            self.loaded.engine.cancel(engine_id)
        self._open.clear()
        self._ready.clear()
        self.shop.admission.leave(self._places)
        self.shop.metrics.in_flight.dec()

    async def answers(self) -> list[Answer]:
        """Every answer, whole: the fold over the stream."""
        found = [Answer() for _ in range(self._places)]
        async for deltas in self.batches():
            for delta in deltas:
                found[delta.index].add(delta)
        return found


def nth_sampling(sampling: SamplingParams, index: int) -> SamplingParams:
    """The parameters of one of n answers: each has a seed of its own, from the one given."""
    if sampling.seed is None or index == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + index) % 2**63)
