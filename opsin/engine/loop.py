"""The engine: a thread that steps the model, and the way in and out of it for many requests."""

from __future__ import annotations

import atexit
import bisect
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch

from opsin.decoder.cache import PagedCache
from opsin.engine.blocks import BlockPool
from opsin.engine.encoding import MediaEncoder
from opsin.engine.grammar import Guide
from opsin.engine.limits import EngineLimits as EngineLimits
from opsin.engine.memory import default_cache_memory
from opsin.engine.model import Model
from opsin.engine.output import Output
from opsin.engine.plan import CachePlan
from opsin.engine.processor import Processor
from opsin.engine.repetition import no_repeat_ngram
from opsin.engine.runner import Runner
from opsin.engine.sampler import LogitsProcessor, Sampler
from opsin.engine.scheduler import Scheduled, Scheduler, prompt_tokens
from opsin.engine.sequence import Sequence
from opsin.engine.speaking import likeliest
from opsin.engine.speculation import Speculator
from opsin.errors import EngineError, InputError, OpsinError, PromptTooLong, QueueFull
from opsin.families.base import Prompt
from opsin.families.speaking import Speaker
from opsin.types import Event, FinishReason, SamplingParams

# What a step can raise because of its input or the machine; the loop outlives all of them.
STEP_ERRORS = (
    OpsinError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)


# How long the other requests of a step wait for what a grammar lets come next.
GRAMMAR_PATIENCE = 0.002  # seconds


@dataclass(slots=True, eq=False)
class _Request:
    """A request beside its sequence: how its tokens are chosen and where its events go.

    `room` is how many tokens, the prompt's included, it may have at most.
    """

    sequence: Sequence
    sampler: Sampler
    output: Output
    on_event: Callable[[Event], None]
    room: int


@dataclass(frozen=True, slots=True)
class _Held:
    """Logits (vocab,) of one request: those its next token is chosen by, then those behind each
    draft.
    """

    rows: SequenceOf[torch.Tensor]
    drafts: tuple[int, ...]


class Stream:
    """The events of one request, in order; closing it early cancels the request."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._cancel: Callable[[], None] = lambda: None
        self._finished = False

    def __iter__(self) -> Iterator[Event]:
        try:
            while not self._finished:
                event = self._events.get()
                self._finished = event.finish_reason is not None
                if event.error is not None:
                    raise event.error
                yield event
        finally:
            self.close()

    def cancel(self) -> None:
        """End the request, from any thread; whoever reads the events still gets the last."""
        self._cancel()

    def close(self) -> None:
        """Cancel the request unless it has finished."""
        if not self._finished:
            self._finished = True
            self._cancel()


class Engine:
    """Continuous batching over one model: submit prompts from any thread, receive their events.

    The engine owns its thread and cache until `close`. Every accepted request gets exactly one
    event with a `finish_reason`, its last.
    """

    def __init__(
        self, model: Model, processor: Processor | None, limits: EngineLimits | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        self.limits = limits or EngineLimits()
        self.max_context = self.limits.max_context or model.decoder.config.max_positions
        size = self.limits.block_size
        config = model.decoder.config
        form, kept = self.limits.cache_format(config), self.limits.kept_tokens(config)
        plan = CachePlan.of(
            config,
            model.dtype,
            self.limits.memory or default_cache_memory(model.device),
            block_size=size,
            max_num_seqs=self.limits.max_num_seqs,
            max_context=self.max_context,
            form=form,
            kept=kept,
            step=self.limits.prefill_step_size,
        )
        self.cache = PagedCache(
            config,
            plan.num_blocks,
            size,
            model.dtype,
            model.device,
            plan.num_state_slots,
            plan.num_source_blocks,
            form,
            by_head=model.decoder.native is not None,
        )
        self.scheduler = Scheduler(
            BlockPool(plan.num_blocks),
            self.cache.layout,
            max_num_seqs=plan.num_state_slots,
            max_num_batched_tokens=self.limits.prefill_step_size,
            source_pool=BlockPool(plan.num_source_blocks),
            prefix_cache=self.limits.prefix_cache and not model.decoder.config.has_states,
            long_after=model.decoder.config.long_after,
            kept=kept,
            leaves_media=model.shared_library is not None,
        )
        self.runner = Runner(model, self.cache, self.limits.media_cache, kept)
        self.encoder = MediaEncoder(self.runner)
        self.speculator = None
        if self.limits.speculates(config):
            self.speculator = Speculator(self.max_context, config.long_after)
        self.steps = 0
        self._requests: dict[int, _Request] = {}
        self._said: list[tuple[_Request, Event]] = []  # events that wait for the next step
        self._held: dict[int, _Held] = {}  # logits that wait for their grammar
        self._grammars = ThreadPoolExecutor(1, "opsin-guide")
        self._guiding: Future[None] | None = None
        self._ids = itertools.count()
        self._inbox: deque[_Request] = deque()
        self._cancelled: set[int] = set()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="opsin-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # torch must not be left mid-step when the interpreter goes

    # The way in, from any thread.

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        on_event: Callable[[Event], None],
        processors: Iterable[LogitsProcessor] = (),
        guide: Guide | None = None,
        keep: Collection[int] = (),
        whole: bool = False,
    ) -> int:
        """Queue a request; `on_event` is called from the engine's thread with each of its events.

        `processors` change the logits after those that the sampling parameters ask for; `guide`
        holds the answer to a grammar; `keep` are special tokens that are written out. With `whole`
        there is one event, at the end, with all of the answer: nobody is woken for each token.
        Returns the request's id. Raises PromptTooLong, QueueFull, or EngineError after `close`.
        """
        self._check_length(prompt)
        request_id = next(self._ids)
        sequence = Sequence.start(request_id, prompt, sampling)
        sequence.speaker = self._speaker(prompt, guide)
        output = Output(sequence, self.processor, keep, whole)
        tokenizer = None if self.processor is None else self.processor.tokenizer
        blocker = no_repeat_ngram(self.model.family, tokenizer, sampling)
        sampler = Sampler.of(sampling, [*blocker, *processors], guide)
        request = _Request(sequence, sampler, output, on_event, self._room(prompt))
        with self._wake:
            if self._closing:
                raise EngineError("The engine is closed", remedy="Create another")
            if len(self._inbox) + len(self.scheduler.waiting) >= self.limits.max_queue:
                raise QueueFull(
                    "Too many requests are waiting",
                    why=f"the queue holds {self.limits.max_queue}",
                    remedy="Try again later",
                )
            self._inbox.append(request)
            self._wake.notify()
        return request_id

    def _speaker(self, prompt: Prompt, guide: Guide | None) -> Speaker | None:
        """What a request may say beside the vocabulary's tokens; nothing in a form."""
        speaker = self.model.family.speaker(prompt, self.model.towers)
        if speaker is None or guide is None:
            return speaker
        if speaker.exclusive:
            raise InputError(
                "This task's answers have a form of their own",
                why="it gives places in the picture",
                remedy="Leave out the response format, or the task",
                param="response_format",
            )
        return None

    def _check_length(self, prompt: Prompt) -> None:
        length, read = len(prompt.token_ids), len(prompt.text_ids)
        if read == 0:
            raise InputError("The prompt is empty", remedy="Send some text", param="prompt")
        apart = prompt.encoder_ids is not None
        if length >= self.max_context or read > self.max_context:
            raise PromptTooLong(
                f"The prompt has {read} tokens",
                why=f"the model takes {self.max_context}{'' if apart else ' with the answer'}",
                remedy="Shorten it, or send fewer or smaller pictures",
                param="prompt",
            )
        rows = 0 if prompt.source is None else prompt.source.views.shape[1]
        if not self.scheduler.can_ever_run(0, rows):
            size = self.scheduler.source_pool.num_blocks * self.limits.block_size
            raise PromptTooLong(
                f"The {'prompt takes' if apart else 'pictures take'} {rows} places",
                why=f"the cache holds {size} for what an encoder made",
                remedy="Send fewer pictures, or give the cache more memory",
                param="prompt",
            )
        span = max((last - first for first, last in prompt.atomic_spans), default=0)
        if not self.scheduler.can_ever_run(length + 1, longest_span=span):
            size = self.scheduler.pool.num_blocks * self.limits.block_size
            raise PromptTooLong(
                f"The prompt has {length} tokens",
                why=f"the key-value cache holds {size}",
                remedy="Shorten it, or give the cache more memory",
                param="prompt",
            )

    def _room(self, prompt: Prompt) -> int:
        """How many tokens a sequence may have: what the model takes, and all of the cache holds."""
        span = max((last - first for first, last in prompt.atomic_spans), default=0)
        sizes = range(len(prompt.token_ids) + 1, self.max_context + 1)

        def is_over(size: int) -> bool:
            return not self.scheduler.can_ever_run(size, longest_span=span)

        return len(prompt.token_ids) + bisect.bisect_left(sizes, True, key=is_over)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        processors: Iterable[LogitsProcessor] = (),
        guide: Guide | None = None,
        keep: Collection[int] = (),
        whole: bool = False,
    ) -> Stream:
        """Queue a request and iterate over its events; an error event is raised."""
        stream = Stream()
        put = stream._events.put
        request_id = self.submit(prompt, sampling, put, processors, guide, keep, whole)
        stream._cancel = lambda: self.cancel(request_id)
        return stream

    def cancel(self, request_id: int) -> None:
        """End a request before its next step; it gets a last event with reason "cancelled"."""
        with self._wake:
            self._cancelled.add(request_id)
            self._wake.notify()

    def close(self) -> None:
        """Cancel what runs, end the thread and free the cache."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._grammars.shutdown()
        atexit.unregister(self.close)
        self.cache.free()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # The loop, in the engine's thread.

    def _run(self) -> None:
        try:
            self._loop()
        finally:  # whatever ended the thread, nobody waits for an answer that will not come
            self.encoder.close()
            self._tell()
            with self._wake:
                self._closing = True
                abandoned = [*self._requests.values(), *self._inbox]
                self._inbox.clear()
            for request in abandoned:
                gone = EngineError("The engine has stopped", remedy="Load the model again")
                request.on_event(request.output.last("error", gone))

    def _loop(self) -> None:
        while True:
            can_step = self._can_step()
            if not can_step:
                self._tell()
            # Without the lock: who asks for something right after this look waits for one step.
            asked = self._inbox or self._cancelled or self._closing
            if (asked or not can_step) and self._take_in():
                return
            if self._requests:
                self._guarded_step()

    def _take_in(self) -> bool:
        """Wait for something to do, and see to what other threads ask; whether that is to end."""
        with self._wake:
            while not (self._inbox or self._cancelled or self._closing or self._can_step()):
                self._wake.wait()
            arrived = list(self._inbox)
            self._inbox.clear()
            cancelled = set(self._cancelled)
            self._cancelled.clear()
            closing = self._closing
        self._admit(arrived)
        for request_id in list(self._requests) if closing else cancelled:
            if request_id in self._requests:
                self._finish(self._requests[request_id], "cancelled")
        return closing

    def _admit(self, arrived: list[_Request]) -> None:
        """Take new requests out of the list, which would keep their pixels while it waits."""
        while arrived:
            request = arrived.pop(0)
            self._requests[request.sequence.request_id] = request
            self.scheduler.add(request.sequence)

    def _can_step(self) -> bool:
        """Whether there is something to compute, and not only grammars to wait for."""
        waiting = self._guiding is not None and not self._guiding.done()
        return len(self._requests) > len(self._held) or bool(self._held and not waiting)

    def _guarded_step(self) -> None:
        step: list[Scheduled] = []
        try:
            if self._held:
                self._choose_held()
            drafts: dict[int, list[int]] = {}
            if self.speculator is not None:
                drafts = self.speculator.plan(self.scheduler.running)
            step = self.scheduler.schedule(drafts)
            step = self._encoded(step)
            if step:
                self._step(step)
            else:
                self._tell()
            self._guide_on()
        except STEP_ERRORS as error:
            failed = {s.sequence.request_id for s in step} or set(self._requests)
            for request_id in failed & set(self._requests):
                self._finish(self._requests[request_id], "error", error)

    def _encoded(self, step: list[Scheduled]) -> list[Scheduled]:
        """A step without the requests whose media are being encoded, or could not be."""
        try:
            ready = self.encoder.ready(step, self._tell)
        except STEP_ERRORS as error:
            for sequence in list(self.encoder.sequences):
                self._finish(self._requests[sequence.request_id], "error", error)
            left = [s for s in step if s.sequence.request_id in self._requests]
            return [s for s in left if not self.runner.lacks_media(s)]
        self.steps += not ready  # a slice of a tower's work alone is one too
        return ready

    def _step(self, step: list[Scheduled]) -> None:
        """Run one step and hand every sampled token to its request."""
        now = time.perf_counter()
        for scheduled in step:
            if scheduled.sequence.started == 0.0:
                scheduled.sequence.started = now
        misses = self.runner.encoded.misses
        sampling = [s for s in step if s.samples]
        samplers = [self._requests[s.sequence.request_id].sampler for s in sampling]
        plain = all(sampler.is_plain_greedy for sampler in samplers)
        prompts = prompt_tokens(step)
        try:
            logits, greedy = self.runner.run(
                step, lambda: self._before_layers(step, prompts), plain
            )
        finally:
            beside = self.encoder.end_beside(step)
        alone = not beside and self.runner.encoded.misses == misses
        if alone:  # else a tower's time is among the step's, or it had half of the threads
            self.scheduler.pace.observe(prompts, time.perf_counter() - now)
        self.scheduler.computed(step)
        self.steps += 1
        if greedy is None:
            greedy = likeliest(() if logits is None else logits)
        if self.speculator is not None and alone:
            self.speculator.observe(step, time.perf_counter() - now)
        # All at once: each look waits for the threads that read answers.
        rows = None if plain or logits is None else list(logits)
        if self._guiding is not None and not all(sampler.is_ready for sampler in samplers):
            wait([self._guiding], GRAMMAR_PATIENCE)
        row = 0
        for scheduled in sampling:
            request, drafts = self._requests[scheduled.sequence.request_id], scheduled.drafts
            scheduled.sequence.num_drafted += len(drafts)
            after = row + 1 + len(drafts)
            own = None if rows is None else rows[row:after]
            self._choose(request, own, drafts, greedy[row:after])
            row = after

    def _before_layers(self, step: list[Scheduled], prompts: int) -> None:
        """What is done right before the decoder computes, outside Python; `prompts` are tokens."""
        self._tell()
        if prompts:
            self.encoder.begin_beside(step, self.scheduler.pace.seconds(prompts))

    def _choose(
        self,
        request: _Request,
        rows: SequenceOf[torch.Tensor] | None,
        drafts: tuple[int, ...],
        greedy: SequenceOf[int],
    ) -> None:
        """Choose a request's next token, and more as long as drafts turn out to be what is chosen.

        Row i counts if the tokens before it are drafts[:i]; `greedy` are the largest of each, where
        nothing else is asked there need not be more. The rest is held if the grammar is not ready.
        """
        sequence, open_requests = request.sequence, self._requests
        for i, likely in enumerate(greedy):
            if i and not request.sampler.is_ready:
                self._guide_on()
                wait([self._guiding] if self._guiding is not None else [], GRAMMAR_PATIENCE)
            if not request.sampler.is_ready:
                assert rows is not None  # only a grammar is not ready, and it asks for them
                rest = [row.clone() for row in rows[i:]]
                self._held[sequence.request_id] = _Held(rest, drafts[i:])
                return
            self._sampled(request, likely, None if rows is None else rows[i])
            over = sequence.request_id not in open_requests
            if over or drafts[i : i + 1] != (sequence.token_ids[-1],):
                return
            sequence.num_accepted += 1
            self.scheduler.accept(sequence)

    # Grammars: what may come next is found out beside the model's step, in a thread of its own; a
    # request whose grammar takes longer than the step is held, and holds up no other.

    def _guide_on(self) -> None:
        """Start on what may follow the tokens that were chosen."""
        if self._guiding is not None and not self._guiding.done():
            return
        behind = [
            request.sampler.guide
            for request in self._requests.values()
            if request.sampler.guide is not None and not request.sampler.guide.ready
        ]
        self._guiding = self._grammars.submit(_compute_all, behind) if behind else None
        if self._guiding is not None:
            self._guiding.add_done_callback(self._awake)

    def _awake(self, done: object) -> None:
        del done
        with self._wake:
            self._wake.notify()

    def _choose_held(self) -> None:
        """Choose tokens for the requests whose grammars have caught up."""
        for request_id, held in list(self._held.items()):
            request = self._requests[request_id]
            if request.sequence.num_computed < len(request.sequence.token_ids):
                del self._held[request_id]  # it lost its place: its logits come again
            elif request.sampler.is_ready:
                del self._held[request_id]
                try:
                    self._choose(request, held.rows, held.drafts, likeliest(held.rows))
                except STEP_ERRORS as error:
                    self._finish(request, "error", error)

    def _sampled(self, request: _Request, greedy: int, logits: torch.Tensor | None) -> None:
        sequence, sampler = request.sequence, request.sampler
        if sampler.guide is not None and sampler.guide.failure is not None:
            self._finish(request, "error", sampler.guide.failure)
            return
        token, logprob = greedy, None
        if not sampler.is_plain_greedy:
            assert logits is not None
            token, logprob = sampler.sample(logits.clone(), sequence.token_ids, sequence.num_prompt)
        if sequence.num_generated == 0:
            sequence.first_token = time.perf_counter()
        sequence.token_ids.append(token)
        full = len(sequence.token_ids) >= request.room
        complete = sampler.accept(token)
        event, reason = request.output.push(token, logprob, out_of_room=full, complete=complete)
        if reason is not None:
            self._finish(request, reason)
        elif event is not None:
            self._said.append((request, event))

    def _finish(
        self, request: _Request, reason: FinishReason, error: Exception | None = None
    ) -> None:
        del self._requests[request.sequence.request_id]
        self._held.pop(request.sequence.request_id, None)
        if self.speculator is not None:
            self.speculator.forget(request.sequence.request_id)
        self.encoder.forget(request.sequence)
        self.scheduler.finish(request.sequence)
        if error is not None and not isinstance(error, OpsinError):
            failure = EngineError("The request failed inside the engine", why=type(error).__name__)
            failure.__cause__ = error
            error = failure
        self._said.append((request, request.output.last(reason, error)))

    def _tell(self) -> None:
        """Hand out the events so far.

        Called right before the decoder computes, outside Python: whoever reads them would else
        hold up this thread.
        """
        said, self._said = self._said, []
        for request, event in said:
            request.on_event(event)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread still runs: false after `close`, or had it died."""
        return self._thread.is_alive()

    def stats(self) -> dict[str, Any]:
        """Counts for health checks and metrics; may be read from any thread."""
        return {
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting) + len(self._inbox),
            "free_blocks": self.scheduler.pool.num_free,
            "num_blocks": self.scheduler.pool.num_blocks,
            "kept_blocks": self.scheduler.pool.num_kept,
            "encoded_hits": self.runner.encoded.hits,
            "encoded_misses": self.runner.encoded.misses,
            "encoded_bytes": self.runner.encoded.num_bytes,
            **media_counts(self.processor),
            "steps": self.steps,
        }


def media_counts(processor: Processor | None) -> dict[str, int]:
    """How often media were found fetched or prepared, and what they take."""
    counts = {}
    if processor is not None:
        for name, cache in (("fetched", processor.fetched), ("prepared", processor.prepared)):
            counts[f"{name}_hits"] = cache.hits
            counts[f"{name}_misses"] = cache.misses
            counts[f"{name}_bytes"] = cache.num_bytes
    return counts


def _compute_all(guides: list[Guide]) -> None:
    for guide in guides:
        guide.compute()
