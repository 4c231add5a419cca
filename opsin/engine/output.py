"""From sampled tokens to events: detokenising, stop strings, and why a request ends."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection

from opsin.engine.processor import Processor
from opsin.engine.sequence import Sequence
from opsin.prompt.detokenize import Detokenizer
from opsin.prompt.stop import StopMatcher
from opsin.types import Event, FinishReason, Timings, TokenLogprob, Usage


class Output:
    """One request's way out: tokens go in, text that is certain comes out."""

    def __init__(
        self,
        sequence: Sequence,
        processor: Processor | None,
        keep: Collection[int] = (),
        whole: bool = False,
    ) -> None:
        """`keep` are special tokens whose text is part of the answer's; with `whole` all of it
        waits for the last event.
        """
        sampling = sequence.sampling
        self.whole = whole
        self.sequence = sequence
        self.detokenizer = None
        if processor is not None:
            kept = processor.answer_ids.union(keep)
            self.detokenizer = Detokenizer(processor.tokenizer, keep=kept)
        self.stop = StopMatcher(sampling.stop)
        self.end_ids = set(sampling.stop_token_ids)
        if processor is not None and not sampling.ignore_eos:
            self.end_ids |= processor.eos_token_ids
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.ends: list[int] = []
        self.text = ""

    def push(
        self,
        token: int,
        logprob: TokenLogprob | None,
        *,
        out_of_room: bool,
        complete: bool = False,
    ) -> tuple[Event | None, FinishReason | None]:
        """Take a sampled token; the event to send now, if any, and why the request ends, if it
        does. `complete`: a grammar allows nothing after it.

        When it ends, `last` makes the event to send instead.
        """
        self.token_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if token in self.end_ids:
            self._flush()
            return None, "stop"
        self.text += self.stop.push(self._said(token))
        if self.whole:
            self.ends.append(len(self.text))
        if self.stop.stopped:
            return None, "stop"
        if complete:
            self._flush()
            return None, "stop"
        if out_of_room or self.sequence.num_generated >= self.sequence.sampling.max_tokens:
            self._flush()
            return None, "length"
        return None if self.whole else self._take(), None

    def _said(self, token: int) -> str:
        """The text that a token adds."""
        speaker = self.sequence.speaker
        own = None if speaker is None else speaker.say(token)
        if own is not None:
            return own
        return "" if self.detokenizer is None else self.detokenizer.push(token)

    def _flush(self) -> None:
        """Release what waited for more: half characters, and the start of a stop string."""
        if self.detokenizer is not None:
            self.text += self.stop.push(self.detokenizer.finish())
        if self.sequence.speaker is not None:
            self.text += self.stop.push(self.sequence.speaker.close())
        self.text += self.stop.finish()

    def _take(self) -> Event:
        event = Event(self.text, tuple(self.token_ids), tuple(self.logprobs))
        self.text = ""
        self.token_ids = []
        self.logprobs = []
        return event

    def last(self, reason: FinishReason, error: Exception | None = None) -> Event:
        """The request's last event, with usage and timings."""
        pending = self._take()
        return Event(
            pending.text,
            pending.token_ids,
            pending.logprobs,
            reason,
            self.usage(),
            self.timings(),
            error,
            self.stop.matched,
            self.ends,
        )

    def usage(self) -> Usage:
        """Token counts so far."""
        media: Counter[str] = Counter()
        for item in self.sequence.prompt.media:
            media[item.kind] += item.num_tokens
        return Usage(
            prompt_tokens=len(self.sequence.prompt.text_ids),
            generation_tokens=self.sequence.num_generated,
            cached_tokens=self.sequence.num_cached,
            media_tokens=dict(media),
            drafted_tokens=self.sequence.num_drafted,
            accepted_tokens=self.sequence.num_accepted,
        )

    def timings(self) -> Timings:
        """Where the time went; prefill ends with the first token."""
        sequence, now = self.sequence, time.perf_counter()
        timings = sequence.timings
        started = sequence.started or now
        timings.queue = started - sequence.submitted
        first = sequence.first_token or now
        timings.prefill = first - started - timings.encode
        timings.generate = now - first
        return timings
