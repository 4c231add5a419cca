"""Guesses at what comes next: the same answers with them, in fewer steps, and never much slower."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opsin
from opsin.decoder.config import DecoderConfig, DeltaNetConfig, LayerConfig, MLPConfig
from opsin.engine import loop
from opsin.engine.blocks import BlockPool
from opsin.engine.fallback import FallbackEngine, FallbackModel
from opsin.engine.grammar import grammar_text
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.scheduler import Scheduled, Scheduler
from opsin.engine.sequence import Sequence as EngineSequence
from opsin.engine.speculation import MOST, WIDE, Costs, Drafter, NgramIndex, Speculator
from opsin.errors import InputError
from opsin.families.base import Prompt
from opsin.types import Constraint, Event, SamplingParams
from tests.families.checkpoints import write_checkpoint
from tests.families.ours import Ours, tokens
from tests.families.pictures import picture
from tests.families.scenes import scenes
from tests.families.zoo import CASES

BLOCK = 8
GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)
SAMPLINGS = {
    "greedy": {},
    "hot": {"temperature": 0.7, "seed": 5, "top_p": 0.9, "min_p": 0.01, "logprobs": 2},
    "cold": {"temperature": 0.05, "seed": 1, "top_k": 3},
    "penalties": {
        "repetition_penalty": 1.05,
        "repetition_context_size": 6,
        "presence_penalty": 0.01,
        "frequency_penalty": 0.01,
        "logit_bias": {7: 1.0, 9: -2.0},
        "logprobs": 3,
    },
    "blocker": {"no_repeat_ngram_size": 9, "no_repeat_ngram_window": 30},
}


# Where guesses come from.


def brute(tokens: Sequence[int], count: int, barred: set[int], longest: int) -> list[int]:
    """What follows the longest run that ends the tokens, the latest of the longest."""
    end, best, found = len(tokens) - 1, 1, -1
    for place in range(1, end):
        if {place, place - 1} & barred:
            continue
        length = 0
        while length <= min(longest - 1, place) and tokens[place - length] == tokens[end - length]:
            length += 1
        if length >= max(best, 2):
            best, found = length, place
    guesses: list[int] = []
    for i in range(found + 1, found + 1 + count if found > 0 else 0):
        if i in barred:
            break
        guesses.append(tokens[i] if i <= end else guesses[found - end])
    return guesses


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.integers(0, 3), min_size=0, max_size=60),
    barred=st.sets(st.integers(0, 20), max_size=4),
    count=st.integers(1, 8),
    pieces=st.lists(st.integers(1, 9), max_size=8),
)
def test_guesses_continue_the_longest_and_latest_run(
    words: list[int], barred: set[int], count: int, pieces: list[int]
) -> None:
    index = NgramIndex(barred, candidates=1000)
    length = 0
    for piece in [*pieces, len(words)]:  # what was asked on the way changes nothing
        length = min(length + piece, len(words))
        guesses, run = index.propose(words[:length], count)
        assert guesses == brute(words[:length], count, barred, index.longest)
        assert (run >= 2) == (run > 0)
        if run and not guesses:
            assert barred


def test_a_run_that_meets_its_continuation_goes_on_as_it_began() -> None:
    assert NgramIndex().propose([1, 2, 3, 9, 2, 3, 9, 2, 3], 7)[0] == [9, 2, 3, 9, 2, 3, 9]
    assert NgramIndex().propose([5, 5, 5], 4) == ([5, 5, 5, 5], 2)


def test_a_long_prompt_enters_the_index_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.engine.speculation.CATCH_UP", 4)
    index = NgramIndex()
    words = [*range(20), 13, 14]
    found = [index.propose(words, 2)[0] for _ in range(4)]
    assert found == [[], [], [], [15, 16]]


def test_tokens_of_pictures_are_never_guessed() -> None:
    words = [1, 2, 50, 50, 50, 3, 4, 1, 2]
    assert NgramIndex({2, 3, 4}).propose(words, 4) == ([], 2)
    assert NgramIndex({2, 3, 4}).propose([*words, 50, 50], 4)[0] == []


# Whether guessing pays, on a clock of our own.


class Clock:
    """A machine whose steps take what `cost` says of (requests, guesses), with noise."""

    def __init__(self, cost: Callable[[int, int], float], texts: list[list[int]]) -> None:
        self.cost = cost
        self.noise = random.Random(1)
        self.speculator = Speculator(10**6)
        self.texts = texts
        self.drafted = 0

    def run(self) -> float:
        """Seconds until every text is said, from its 20th token on, with guesses."""
        sequences = [
            EngineSequence.start(
                i,
                Prompt(text[:20], torch.zeros(1, 20), 20, [], []),
                SamplingParams(max_tokens=len(text) - 20),
            )
            for i, text in enumerate(self.texts)
        ]
        for sequence in sequences:
            self._say(sequence)
        spent = 0.0
        while sequences:
            chosen = self.speculator.plan(sequences)
            step = []
            for sequence in sequences:
                drafts, start = tuple(chosen.get(sequence.request_id, ())), sequence.num_computed
                step.append(Scheduled(sequence, start, start + 1 + len(drafts), drafts))
            guesses = sum(len(s.drafts) for s in step)
            self.drafted += guesses
            seconds = self.cost(len(step), guesses)
            spent += seconds
            self.speculator.observe(step, seconds * self.noise.uniform(0.95, 1.2))
            for scheduled in step:
                sequence = scheduled.sequence
                for guess in (*scheduled.drafts, None):
                    sequence.num_computed += 1
                    if self._say(sequence) != guess:
                        break
            for sequence in sequences:
                if len(sequence.token_ids) >= len(self.texts[sequence.request_id]):
                    self.speculator.forget(sequence.request_id)
            sequences = [s for s in sequences if len(s.token_ids) < len(self.texts[s.request_id])]
        return spent

    def _say(self, sequence: EngineSequence) -> int:
        sequence.num_computed = max(sequence.num_computed, sequence.num_prompt)
        token = self.texts[sequence.request_id][len(sequence.token_ids)]
        sequence.token_ids.append(token)
        return token

    def plainly(self) -> float:
        """Seconds of the same without guesses."""
        lengths = sorted(len(text) - 21 for text in self.texts)
        steps = zip([0, *lengths], lengths, range(len(lengths), 0, -1), strict=False)
        return sum((to - since) * self.cost(requests, 0) for since, to, requests in steps)


COSTS: dict[str, Callable[[int, int], float]] = {
    "bound by memory": lambda requests, guesses: 1 + 0.02 * (requests + guesses),
    "bound by arithmetic": lambda requests, guesses: 0.5 + 0.5 * (requests + guesses),
    "another kernel for several rows": lambda requests, guesses: 1 + 2 * (requests + guesses > 1),
    "tiles of four rows": lambda requests, guesses: 1 + 0.3 * ((requests + guesses - 1) // 4),
}


def misleading(length: int, seed: int) -> list[int]:
    """Every pair comes again and again, with something else behind it each time."""
    generator = random.Random(seed)
    made: list[int] = []
    while len(made) < length:
        pair = generator.randrange(4)
        made += [2 * pair, 2 * pair + 1, 100 + len(made)]
    return made


def turning(length: int, seed: int) -> list[int]:
    """Text that repeats for a while, and then does not, and so on."""
    generator = random.Random(seed)
    made: list[int] = []
    while len(made) < length:
        made += made[-40:] if made and generator.random() < 0.5 else misleading(40, seed)
    return made


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("streams", [1, 3, 8])
def test_no_text_takes_much_longer_with_guesses(
    cost: Callable[[int, int], float], streams: int
) -> None:
    for text in (misleading, turning):
        for length in (60, 200, 1000):
            clock = Clock(cost, [text(length, seed) for seed in range(streams)])
            # One step may tell for the first time what guesses cost.
            surprise = cost(streams, 1) - cost(streams, 0)
            assert clock.run() <= 1.025 * clock.plainly() + surprise


@pytest.mark.parametrize("streams", [1, 2])
def test_a_text_that_repeats_takes_fewer_steps(streams: int) -> None:
    texts = [[*range(100 * i, 100 * i + 30)] * 8 for i in range(streams)]
    clock = Clock(COSTS["bound by memory"], texts)
    assert clock.run() < clock.plainly() / 3
    assert clock.drafted > 100 * streams


def test_guesses_that_cost_more_than_they_save_are_not_computed() -> None:
    texts = [[*range(30)] * 40]
    clock = Clock(lambda requests, guesses: requests + 1.3 * guesses, texts)
    clock.run()
    assert clock.drafted <= 60, "of 1180 tokens: measurements fade, and are made again"


def test_a_wide_batch_makes_no_guesses() -> None:
    clock = Clock(COSTS["bound by memory"], [[*range(30)] * 4 for _ in range(WIDE + 1)])
    clock.run()
    assert clock.drafted == 0


def test_no_guess_lies_past_the_end_of_anything() -> None:
    def room(length: int, most: int, **limits: Any) -> int:
        sequence = sequence_of(0, length)
        sequence.sampling = SamplingParams(max_tokens=most)
        sequence.token_ids.append(1)
        return Speculator(**{"max_context": 1000, **limits})._room(sequence)

    assert room(20, 5) == 3, "one was said, and one follows the guesses"
    assert room(20, 100, max_context=30) == 8
    assert room(20, 100, long_after=30) == 9, "the angles change behind the 30th token"
    assert room(20, 1) == -1


def test_one_disturbed_measurement_does_not_stand_for_ever() -> None:
    costs = Costs()
    costs.observe(1, 0, 1.0)
    costs.observe(1, 1, 50.0)
    assert costs.more(1, 1) > 1
    for _ in range(1500):
        costs.observe(1, 0, 1.0)
    assert costs.more(1, 1) < 0.3


# The same answers. Guesses are computed whenever there are any, whatever they cost.


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute all guesses, as if they cost nothing."""
    monkeypatch.setattr(
        Drafter, "worth", lambda self, costs, requests, others, most: min(most, len(self.guesses))
    )
    monkeypatch.setattr(Costs, "most", lambda *_: MOST * WIDE)


def often_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess at every step, with tokens among it that nothing speaks for."""
    propose, chance = NgramIndex.propose, random.Random(3)

    def wild(index: NgramIndex, words: Sequence[int], count: int) -> tuple[list[int], int]:
        guesses, run = propose(index, words, count)
        guesses = guesses or [chance.randrange(50) for _ in range(count)]
        return [g if chance.random() < 0.7 else chance.randrange(50) for g in guesses], max(run, 2)

    monkeypatch.setattr(NgramIndex, "propose", wild)


@pytest.fixture(params=["as found", "often wrong"])
def guessing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses at every step: those of the index, or such as break off anywhere."""
    eager(monkeypatch)
    if request.param == "often wrong":
        often_wrong(monkeypatch)


def engine_of(loaded: tuple[Any, Any], *, guesses: bool, **limits: Any) -> Engine:
    base: dict[str, Any] = {"memory": 1 << 24, "block_size": BLOCK, "media_cache": 0}
    base["speculative"] = "ngram" if guesses else None
    return Engine(*loaded, EngineLimits(**{**base, **limits}))


def close(engine: Engine) -> None:
    assert not engine.scheduler.has_work
    engine.scheduler.pool.forget()
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    assert engine.speculator is None or not engine.speculator._drafters
    engine.close()


def prompts(processor: Any) -> list[Prompt]:
    images = [[], [picture(1, 90, 70)], [picture(2, 60, 100), picture(3, 33, 31)]]
    questions = ("one two one two one two", "What is it? What is it?", "How many?")
    return [processor.prepare(q, images=i) for q, i in zip(questions, images, strict=True)]


def mixed(engine: Engine, samplings: Sequence[SamplingParams]) -> list[list[Event]]:
    """Every prompt with every kind of sampling at once; the events of each."""
    streams = [
        engine.stream(prompt, sampling)
        for sampling in samplings
        for prompt in prompts(engine.processor)
    ]
    return [list(stream) for stream in streams]


def same(events: list[Event], expected: list[Event], *, exactly: bool) -> None:
    """Two answers agree: tokens, text and ends; log probabilities bit for bit or nearly."""
    assert tokens(events) == tokens(expected)
    assert "".join(e.text for e in events) == "".join(e.text for e in expected)
    assert events[-1].finish_reason == expected[-1].finish_reason
    assert events[-1].stop_string == expected[-1].stop_string
    ours, theirs = ([lp for e in answer for lp in e.logprobs] for answer in (events, expected))
    assert [lp.token_id for lp in ours] == [lp.token_id for lp in theirs]
    if exactly:
        assert ours == theirs
    assert [lp.logprob for lp in ours] == pytest.approx([lp.logprob for lp in theirs], abs=1e-4)


FORMS: dict[str, dict[str, Any]] = {
    "16 bits": {},
    "8 bits, late, a window": {"kv_bits": 8, "quantized_kv_start": 19, "max_kv_size": 30},
    "4 bits": {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0},
    "few places, small steps": {"max_num_seqs": 3, "prefill_step_size": 7, "memory": 1 << 19},
}


@pytest.mark.usefixtures("guessing")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_answers_are_those_without_guesses(loaded: tuple[Any, Any], form: dict[str, Any]) -> None:
    samplings = [
        SamplingParams(max_tokens=40, ignore_eos=True, **fields) for fields in SAMPLINGS.values()
    ]
    every = []
    for guesses in (False, True):
        engine = engine_of(loaded, guesses=guesses, **form)
        every.append(mixed(engine, samplings[:2] if form else samplings))
        close(engine)
    for expected, events in zip(*every, strict=True):
        same(events, expected, exactly=loaded[0].decoder.native is not None)
        assert expected[-1].usage.drafted_tokens == 0
        assert len(tokens(events)) == events[-1].usage.generation_tokens == 40
    assert sum(events[-1].usage.drafted_tokens for events in every[1]) > 0


@pytest.mark.usefixtures("guessing")
def test_what_was_guessed_is_found_again_as_what_was_not(loaded: tuple[Any, Any]) -> None:
    asked, again = prompts(loaded[1])[0], []
    for guesses in (False, True):
        engine = engine_of(loaded, guesses=guesses)
        (first,) = [list(engine.stream(asked, GREEDY))]
        ids = [*asked.token_ids, *tokens(first)]
        positions, following = loaded[0].family.positions(ids, [])
        longer = Prompt(ids, positions, following, [], [])
        second = list(engine.stream(longer, GREEDY))
        close(engine)
        plainly = engine_of(loaded, guesses=False, prefix_cache=False)
        same(second, list(plainly.stream(longer, GREEDY)), exactly=False)
        close(plainly)
        again.append(second[-1].usage.cached_tokens)
    assert again[0] == again[1] == (len(asked.token_ids) + 48 - 1) // BLOCK * BLOCK


@pytest.mark.usefixtures("guessing")
@pytest.mark.parametrize("count", [1, 2, 3, 9, 14])
def test_an_answer_ends_where_its_tokens_do(loaded: tuple[Any, Any], count: int) -> None:
    asked = prompts(loaded[1])[0]
    every = []
    for guesses in (False, True):
        engine = engine_of(loaded, guesses=guesses)
        every.append(list(engine.stream(asked, SamplingParams(max_tokens=count, ignore_eos=True))))
        close(engine)
    same(every[1], every[0], exactly=False)
    assert every[1][-1].finish_reason == "length"
    room = len(asked.token_ids) + count
    engine = engine_of(loaded, guesses=True, max_context=room)
    same(list(engine.stream(asked, GREEDY)), every[0], exactly=False)
    close(engine)


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return opsin.load("bundled", device="cpu")


def spoken(engine: Engine, text: str) -> Callable[..., torch.Tensor]:
    """A logits processor that makes the answer a text and its end."""
    processor = engine.processor
    assert processor is not None
    ids = [*processor.tokenizer.encode(text, add_special_tokens=False)]
    ids.append(min(processor.eos_token_ids))

    def process(logits: torch.Tensor, said: Sequence[int], num_prompt: int) -> torch.Tensor:
        logits.fill_(-100.0)
        logits[ids[min(len(said) - num_prompt, len(ids) - 1)]] = 100.0
        return logits

    return process


ROWS = "a 12, b 34, c 56; " * 4


@pytest.mark.usefixtures("guessing")
@pytest.mark.parametrize("stop", ["56", "; a 12", "34, c", ROWS[:60]])
def test_a_stop_string_may_end_within_guesses(bundled: tuple[Any, Any], stop: str) -> None:
    every = []
    for guesses in (False, True):
        engine = engine_of(bundled, guesses=guesses)
        prompt = bundled[1].prepare(f"Repeat: {ROWS}")
        sampling = SamplingParams(max_tokens=200, stop=(stop,))
        every.append(list(engine.stream(prompt, sampling, [spoken(engine, ROWS)])))
        close(engine)
    same(every[1], every[0], exactly=False)
    assert every[1][-1].stop_string == stop
    assert every[1][-1].usage.drafted_tokens > 0


SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
        "required": ["name", "count"],
        "additionalProperties": False,
    },
    "minItems": 3,
    "maxItems": 5,
}


@pytest.mark.usefixtures("guessing")
@pytest.mark.parametrize("patience", [loop.GRAMMAR_PATIENCE, 0.0])
def test_a_form_is_kept_as_without_guesses(
    bundled: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    monkeypatch.setattr(loop, "GRAMMAR_PATIENCE", patience)
    text = grammar_text(Constraint("json_schema", SCHEMA), None)
    assert text is not None
    samplings = [
        SamplingParams(max_tokens=120),
        SamplingParams(max_tokens=120, temperature=1.2, seed=2, logprobs=1),
        SamplingParams(max_tokens=120, temperature=0.8, seed=3, presence_penalty=0.5),
    ]
    every = []
    for guesses in (False, True):
        engine = engine_of(bundled, guesses=guesses)
        grammar = bundled[1].grammars.compile(text, "response_format")
        streams = [
            engine.stream(bundled[1].prepare("List them."), sampling, guide=guide)
            for sampling in samplings
            for guide in (grammar.guide(), None)
        ]
        every.append([list(stream) for stream in streams])
        close(engine)
    for expected, events in zip(*every, strict=True):
        same(events, expected, exactly=False)
    assert sum(events[-1].usage.accepted_tokens for events in every[1]) > 0


@pytest.mark.usefixtures("guessing")
def test_cancelling_among_guesses_leaves_nothing_behind(loaded: tuple[Any, Any]) -> None:
    engine = engine_of(loaded, guesses=True)
    alone = [list(engine.stream(prompt, GREEDY)) for prompt in prompts(loaded[1])]
    long = SamplingParams(max_tokens=2000, ignore_eos=True)
    leaving = [engine.stream(prompt, long) for prompt in prompts(loaded[1])]
    staying = [engine.stream(prompt, GREEDY) for prompt in prompts(loaded[1])]
    for count, stream in enumerate(leaving):
        events = iter(stream)
        for _ in range(3 * count + 1):
            next(events)
        stream.close()
    for stream, expected in zip(staying, alone, strict=True):
        assert tokens(list(stream)) == tokens(expected)
    list(engine.stream(prompts(loaded[1])[0], SamplingParams(max_tokens=1)))
    close(engine)


def test_a_failure_among_guesses_leaves_nothing_behind(
    plain: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)

    def fails(logits: torch.Tensor, said: Sequence[int], num_prompt: int) -> torch.Tensor:
        if len(said) - num_prompt == 20:
            raise ValueError("broken")
        return logits

    engine = engine_of(plain, guesses=True)
    with pytest.raises(opsin.errors.EngineError, match="failed inside"):
        list(engine.stream(prompts(plain[1])[0], GREEDY, [fails]))
    assert len(tokens(list(engine.stream(prompts(plain[1])[0], GREEDY)))) == 48
    close(engine)


OTHERS = {
    "layers that read pictures": "mllama-two_cross_layers",
    "two sets of rope angles": "phi3_v-grouped_long",
    "an encoder that reads the prompt": "florence2-base",
    "windows": "gemma3-published",
    "points beside text": "molmo_point-odd_crops",
}


@pytest.mark.parametrize("name", OTHERS.values(), ids=OTHERS)
def test_decoders_of_other_kinds_answer_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)
    often_wrong(monkeypatch)
    case = next(case for case in CASES if case.name == name)
    ours = Ours(case, write_checkpoint(case, tmp_path), dtype="float32")
    asked = [ours.prepare(scene) for scene in scenes(case)[:2]]
    loaded = (ours.model, ours.processor)
    every = []
    for guesses in (False, True):
        engine = engine_of(loaded, guesses=guesses, memory=1 << 26)
        sampling = SamplingParams(max_tokens=24, ignore_eos=True, no_repeat_ngram_size=0)
        streams = [engine.stream(prompt, sampling) for prompt in asked]
        every.append([list(stream) for stream in streams])
        close(engine)
    for expected, events in zip(*every, strict=True):
        same(events, expected, exactly=False)
    assert sum(events[-1].usage.drafted_tokens for events in every[1]) > 0
    engine = engine_of(loaded, guesses=True, memory=1 << 26)
    for prompt, events in zip(asked, every[1], strict=True):
        request = engine._speaker(prompt, None)
        assert request is None or events[-1].usage.drafted_tokens == 0
    engine.close()


# What it is for.


def test_an_answer_that_repeats_takes_fewer_steps_and_says_so(
    bundled: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)
    engine = engine_of(bundled, guesses=True)
    prompt = bundled[1].prepare(f"Repeat: {ROWS}")
    events = list(engine.stream(prompt, SamplingParams(max_tokens=200), [spoken(engine, ROWS)]))
    usage = events[-1].usage
    assert "".join(event.text for event in events).strip() == ROWS.strip()
    assert 0 < usage.accepted_tokens <= usage.drafted_tokens
    assert engine.steps <= usage.generation_tokens - usage.accepted_tokens + 1
    assert usage.accepted_tokens > usage.generation_tokens / 2
    close(engine)


def test_costs_are_measured_as_the_engine_runs(bundled: tuple[Any, Any]) -> None:
    engine = engine_of(bundled, guesses=True)
    prompt = bundled[1].prepare("Say something.")
    list(engine.stream(prompt, SamplingParams(max_tokens=12, ignore_eos=True)))
    assert engine.speculator is not None
    assert (engine.speculator.costs.step(1) or 0) > 0
    close(engine)


def test_it_is_off_unless_asked_for(plain: tuple[Any, Any]) -> None:
    with Engine(*plain, EngineLimits(memory=1 << 24)) as engine:
        assert engine.speculator is None
        (events,) = [list(engine.stream(prompts(plain[1])[0], GREEDY))]
        assert events[-1].usage.drafted_tokens == events[-1].usage.accepted_tokens == 0


def test_python_takes_it_by_name_and_reports_it(
    bundled: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(monkeypatch)
    asked: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
    without = opsin.generate(*bundled, "1 2 3 1 2 3 1 2 3", **asked)
    with_it = opsin.generate(*bundled, "1 2 3 1 2 3 1 2 3", speculative="ngram", **asked)
    assert with_it.tokens == without.tokens
    assert without.drafted_tokens == 0
    assert with_it.drafted_tokens > 0
    assert f"{with_it.accepted_tokens} of {with_it.drafted_tokens}" in opsin.api.figures(with_it)
    assert "Guesses" not in opsin.api.figures(without)


def test_a_model_may_be_loaded_to_guess(bundled: tuple[Any, Any], folder: Path) -> None:
    loaded = opsin.load(folder, device="cpu", speculative="ngram")
    engine = opsin.api.engine_for(*loaded)
    assert engine.speculator is not None
    engine.close()
    assert bundled[0].limits.speculative is None
    with pytest.raises(InputError, match="speculative cannot be 'magic'"):
        opsin.load(folder, device="cpu", speculative="magic")
    case = next(case for case in CASES if case.name == "qwen3_5-tied")
    recurrent = write_checkpoint(case, folder.parent / "recurrent")
    with pytest.raises(InputError, match="recurrent layers"):
        opsin.load(recurrent, device="cpu", speculative="ngram")


def test_an_unknown_kind_is_refused(plain: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="speculative cannot be 'magic'"):
        Engine(*plain, EngineLimits(speculative="magic"))


def test_recurrent_layers_cannot_take_guesses_back() -> None:
    layer = LayerConfig(DeltaNetConfig(1, 1, 16, 16, 4), MLPConfig(64))
    config = DecoderConfig(100, 64, (layer,), 128)
    assert not EngineLimits().speculates(config)
    with pytest.raises(InputError, match="recurrent layers") as caught:
        EngineLimits(speculative="ngram").speculates(config)
    assert caught.value.remedy == "Leave speculative out"


def test_a_model_of_transformers_makes_no_guesses() -> None:
    model = FallbackModel.__new__(FallbackModel)  # refused before anything of it is looked at
    with pytest.raises(InputError, match="speculative cannot be used"):
        FallbackEngine(model, None, EngineLimits(speculative="ngram"))


# Blocks.


def sequence_of(number: int, length: int) -> EngineSequence:
    prompt = Prompt([*range(length)], torch.zeros(1, length), length, [], [])
    return EngineSequence.start(number, prompt, SamplingParams())


def run(scheduler: Scheduler, step: list[Scheduled]) -> None:
    scheduler.computed(step)
    for scheduled in step:
        if scheduled.samples:
            scheduled.sequence.token_ids.append(7)


def test_drafts_take_free_blocks_only() -> None:
    scheduler = Scheduler(BlockPool(3), 4, max_num_seqs=2, max_num_batched_tokens=16)
    first, second = sequence_of(0, 3), sequence_of(1, 6)
    for sequence in (first, second):
        scheduler.add(sequence)
    run(scheduler, scheduler.schedule())
    step = scheduler.schedule({0: [1, 2, 3], 1: [4]})
    assert [s.drafts for s in step] == [(), (4,)], "the second has room in its block"
    assert [s.token_ids for s in step] == [[7], [7, 4]]
    assert [s.samples for s in step] == [True, True]
    run(scheduler, step)
    assert (first.num_computed, second.num_computed) == (4, 7), "drafts are not yet certain"
    scheduler.finish(first)
    scheduler.finish(second)
    scheduler.check_integrity()


def test_drafts_leave_every_other_its_token() -> None:
    scheduler = Scheduler(BlockPool(20), 4, max_num_seqs=3, max_num_batched_tokens=4)
    sequences = [sequence_of(i, 1) for i in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    run(scheduler, scheduler.schedule())
    step = scheduler.schedule({0: [1, 2], 1: [3, 4], 2: [5]})
    assert [len(s.drafts) for s in step] == [1, 0, 0]
