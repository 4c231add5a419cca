"""Guesses what a request says next, from its own tokens, where checking guesses pays.

A step that computes a few guessed tokens behind the last one takes little longer than a step
without them, and each guess that turns out right saves a step. A guess is the continuation of the
longest run of tokens that came before (prompt lookup decoding, as in
github.com/apoorvumang/prompt-lookup-decoding). Whether it is right the request's own sampler says,
token by token, so that the answer is the one without guesses.

What is never checked costs nothing: guesses are made, and compared with what came, at every step.
They are computed only where the share that was right, and what such steps were measured to cost,
promise a gain, and as long as all that guessing lost stays within LOSS of a request's time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from opsin.engine.scheduler import Scheduled
from opsin.engine.sequence import Sequence

MOST = 8  # guesses of one request in one step
WIDE = 8  # with more requests than these in a step, its rows already share what it reads
LOSS = 0.02  # of a request's time may be lost by wrong guesses
LEAST_GAIN = 0.05  # of a step's time: less is not told from noise
REMEASURE = 64  # steps with guesses after which one goes without, to see what that costs now
FIRST_COST = 0.1  # of a step's time for each guess, until it was measured
SURPRISE = 4.0  # times as long as a step without guesses: more was something else
SMOOTHING = 0.3  # the weight of a new measurement
FADING = 0.998  # what was measured once counts for so much less with every step without guesses
CATCH_UP = 4096  # tokens that enter the index in one step

# How likely a guess is right whose run is so long, by powers of two, before anything is known, and
# how many guesses that knowledge counts for.
CHANCES = (0.3, 0.3, 0.3, 0.5, 0.7, 0.8)
CHANCES_COUNT = 2.0


class NgramIndex:
    """Where a growing list of tokens says what it said before.

    For every pair of tokens the places where it ended, the latest first, as compressors chain them.
    A token enters in constant time, and a look follows at most `candidates` places back and
    compares at most `longest` tokens at each. At `barred` positions lie no tokens of text.
    """

    def __init__(
        self, barred: Collection[int] = (), *, candidates: int = 8, longest: int = 16
    ) -> None:
        self.barred = frozenset(barred)
        self.candidates = candidates
        self.longest = longest
        self._latest: dict[tuple[int, int], int] = {}
        self._earlier: list[int] = [-1]  # for the pair that ends at each position, the one before

    def propose(self, tokens: SequenceOf[int], count: int) -> tuple[list[int], int]:
        """Up to `count` tokens that may follow, and how long the run is that they followed before.

        `tokens` are those of the last call and more. Of the longest runs, the latest counts; one
        that reaches into its own continuation goes on as it began.
        """
        self._catch_up(tokens)
        end = len(tokens) - 1
        if end < 1:
            return [], 0
        place, best, found = self._latest.get((tokens[end - 1], tokens[end]), -1), 0, -1
        for _ in range(self.candidates):
            if place < 0 or best == self.longest:
                break
            length = self._run(tokens, place, end)
            if length > best:
                best, found = length, place
            place = self._earlier[place]
        if found < 0:
            return [], 0
        period = end - found
        guesses: list[int] = []
        for i in range(found + 1, found + 1 + count):
            if i in self.barred:
                break
            guesses.append(tokens[i] if i <= end else guesses[-period])
        return guesses, best

    def _run(self, tokens: SequenceOf[int], place: int, end: int) -> int:
        """How many tokens up to `place` are those up to `end`."""
        length = 2
        most = min(self.longest, place + 1)
        while length < most and tokens[place - length] == tokens[end - length]:
            length += 1
        return length

    def _catch_up(self, tokens: SequenceOf[int]) -> None:
        """Enter the pairs that end before the last token."""
        latest, earlier, barred = self._latest, self._earlier, self.barred
        first = len(earlier)
        for i in range(first, min(len(tokens) - 1, first + CATCH_UP)):
            if i in barred or i - 1 in barred:
                earlier.append(-1)
                continue
            pair = (tokens[i - 1], tokens[i])
            earlier.append(latest.get(pair, -1))
            latest[pair] = i


@dataclass(slots=True)
class Evidence:
    """How often guesses of one kind were right, the last ones counting most."""

    chance_before: float
    right: float = 0.0
    made: float = 0.0

    @property
    def chance(self) -> float:
        """How likely the next guess is right if the one before it was."""
        right = self.right + self.chance_before * CHANCES_COUNT
        return right / (self.made + CHANCES_COUNT)

    def learn(self, right: int, wrong: int) -> None:
        """Take in how many guesses were right and whether one was wrong."""
        keep = 0.9 ** (right + wrong)
        self.right = self.right * keep + right
        self.made = self.made * keep + right + wrong


class Costs:
    """How much longer a step takes with guesses in it, by requests that generate and guesses."""

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}  # seconds of a step without guesses
        self._more: dict[int, dict[int, float]] = {}  # the share by which guesses lengthen it

    def observe(self, requests: int, guesses: int, seconds: float) -> None:
        """Learn from a step of nothing but these."""
        plain = self._plain.get(requests)
        if guesses == 0:
            self._plain[requests] = _smoothed(plain, seconds, 2.0)
            self._fade(requests)
        elif plain is not None:
            known = self._more.setdefault(requests, {})
            share = min(seconds / plain, SURPRISE)
            if guesses in known:
                share = _smoothed(1 + known[guesses], share, 2.0)
            known[guesses] = max(0.0, share - 1)

    def _fade(self, requests: int) -> None:
        """A disturbed measurement must not stand for ever, which is why it is forgotten slowly."""
        known = self._more.get(requests, {})
        for guesses, share in known.items():
            first = FIRST_COST * guesses
            known[guesses] = first + FADING * (share - first)

    def step(self, requests: int) -> float | None:
        """Seconds of a step without guesses; None where none was seen."""
        return self._plain.get(requests)

    def more(self, requests: int, guesses: int) -> float:
        """Seconds by which so many guesses lengthen a step, as far as is known."""
        plain, known = self._plain[requests], self._more.get(requests)
        if guesses == 0 or not known:
            return plain * FIRST_COST * guesses
        if guesses in known:
            return plain * known[guesses]
        nearest = min(known, key=lambda other: (abs(other - guesses), other))
        return plain * known[nearest] * max(1.0, guesses / nearest)

    def most(self, requests: int) -> int:
        """How many guesses to try at most: twice as many as ever, so that no step is a surprise."""
        return 2 * max(self._more.get(requests, ()), default=0) or 1


def _smoothed(known: float | None, measured: float, most: float) -> float:
    """A running mean, in which a disturbed step counts at most `most` times what is known."""
    if known is None:
        return measured
    return known + SMOOTHING * (min(measured, most * known) - known)


@dataclass(slots=True)
class Drafter:
    """One request's guesses: where they come from, how good they were, what they gained."""

    index: NgramIndex
    evidence: list[Evidence] = field(default_factory=lambda: [Evidence(p) for p in CHANCES])
    guesses: list[int] = field(default_factory=list)  # the last ones, computed or not
    run: int = 0  # how long the run was that they followed
    length: int = 0  # tokens there were when they were made
    computed: int = 0  # how many of them the step computed
    gained: float = 0.0  # seconds, of all requests together, by guesses; negative: lost
    seconds: float = 0.0  # time of this request's steps

    @classmethod
    def of(cls, sequence: Sequence) -> Drafter:
        """A drafter for a request; it guesses no token that stands for a part of a medium."""
        media = (item.indices.tolist() for item in sequence.prompt.media)
        return cls(NgramIndex([i for indices in media for i in indices]))

    def look(self, tokens: SequenceOf[int], step_seconds: float | None) -> None:
        """Judge the last guesses by the tokens that came, and make new ones.

        A right guess that was computed saved a step of `step_seconds`.
        """
        came = tokens[self.length : self.length + len(self.guesses)]
        tried = self.guesses[: self.computed or 1]
        right = 0
        while right < min(len(tried), len(came)) and tried[right] == came[right]:
            right += 1
        if tried and came:
            self._kind(self.run).learn(right, int(right < min(len(tried), len(came))))
            if self.computed and step_seconds is not None:
                self.gained += right * step_seconds
        self.length, self.computed = len(tokens), 0
        self.guesses, self.run = self.index.propose(tokens, MOST)

    def worth(self, costs: Costs, requests: int, others: int, most: int) -> int:
        """How many of the guesses, at most `most`, to compute beside `others` of other requests.

        All `requests` of the step wait for it, and one of them saves steps.
        """
        step = costs.step(requests)
        if step is None:
            return 0
        chance, base = self._kind(self.run).chance, costs.more(requests, others)
        best, gain, expected = 0, LEAST_GAIN * step, 0.0
        for count in range(1, min(most, len(self.guesses)) + 1):
            expected += chance**count
            cost = requests * (costs.more(requests, others + count) - base)
            if self.gained + LOSS * self.seconds < cost:
                continue
            if expected * step - cost > gain:
                best, gain = count, expected * step - cost
        return best

    def _kind(self, run: int) -> Evidence:
        return self.evidence[run.bit_length()]


class Speculator:
    """Decides, step by step, which requests compute guesses, and how many."""

    def __init__(self, max_context: int, long_after: int | None = None) -> None:
        """Nothing is computed past `max_context` tokens, nor past `long_after`, where a request's
        rope angles change.
        """
        self.max_context = max_context
        self.long_after = long_after
        self.costs = Costs()
        self.steps_since_plain = 0
        self._drafters: dict[int, Drafter] = {}

    def plan(self, sequences: Iterable[Sequence]) -> dict[int, list[int]]:
        """The guesses to compute in the next step, by request; of those that generate."""
        generating = [s for s in sequences if s.num_generated and _wants_one(s)]
        requests = len(generating)
        if not generating or requests > WIDE:
            return {}
        step = self.costs.step(requests)
        measuring = self.steps_since_plain >= REMEASURE
        chosen: dict[int, list[int]] = {}
        total, most = 0, self.costs.most(requests)
        for sequence in generating:
            if sequence.speaker is not None:  # it chooses by more than the tokens before
                continue
            drafter = self._drafters.get(sequence.request_id)
            if drafter is None:
                drafter = self._drafters[sequence.request_id] = Drafter.of(sequence)
                drafter.look(sequence.token_ids, step)
                continue  # its first step goes without, and shows what such a step costs
            drafter.look(sequence.token_ids, step)
            if measuring:
                continue
            room = min(self._room(sequence), most - total)
            count = drafter.worth(self.costs, requests, total, room)
            if count:
                chosen[sequence.request_id] = drafter.guesses[:count]
                total += count
        return chosen

    def _room(self, sequence: Sequence) -> int:
        """How many guesses may be right without the request ending before them."""
        tokens = len(sequence.token_ids)
        room = sequence.sampling.max_tokens - sequence.num_generated - 1
        room = min(room, self.max_context - tokens - 1)
        if self.long_after is not None and not sequence.long:
            room = min(room, self.long_after - tokens)
        return room

    def observe(self, step: SequenceOf[Scheduled], seconds: float) -> None:
        """Learn from a step: what guesses cost, to be set against what they gain."""
        generating = [s for s in step if s.samples and s.end - s.start == 1 + len(s.drafts)]
        requests, guesses = len(generating), sum(len(s.drafts) for s in step)
        if len(generating) < len(step):  # prompts are among it, whose time is another
            seconds = 0.0
        else:
            self.steps_since_plain = self.steps_since_plain + 1 if guesses else 0
            self.costs.observe(requests, guesses, seconds)
        known = self.costs.step(requests) is not None
        cost = requests * self.costs.more(requests, guesses) if known else 0.0
        for scheduled in generating:
            drafter = self._drafters.get(scheduled.sequence.request_id)
            if drafter is not None:
                drafter.computed = len(scheduled.drafts)
                drafter.seconds += seconds
                drafter.gained -= cost * len(scheduled.drafts) / max(guesses, 1)

    def forget(self, request_id: int) -> None:
        """A request has ended."""
        self._drafters.pop(request_id, None)


def _wants_one(sequence: Sequence) -> bool:
    return len(sequence.token_ids) - sequence.num_computed == 1
