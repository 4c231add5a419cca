"""The engine as its callers see it: queueing, cancelling, failing and closing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import opsin
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.scheduler import Scheduled
from opsin.errors import EngineError, InputError, QueueFull
from opsin.families.base import Prompt
from opsin.types import Event, SamplingParams
from tests.families.checkpoints import write_checkpoint
from tests.families.pictures import picture
from tests.families.zoo.qwen import CASES

LONG = SamplingParams(max_tokens=3000, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    case = next(case for case in CASES if case.family == "qwen3_vl")
    folder: Path = write_checkpoint(case, tmp_path_factory.mktemp("loop"))
    return opsin.load(str(folder), device="cpu")


@pytest.fixture
def engine(loaded: tuple[Any, Any]) -> Iterator[Engine]:
    limits = EngineLimits(max_num_seqs=2, max_queue=3, memory=1 << 24, block_size=8)
    with Engine(*loaded, limits) as engine:
        yield engine
        engine.scheduler.pool.forget()
        engine.scheduler.check_integrity()


class Inbox:
    """Collects one request's events and waits for the last."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.first, self.done = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.first.set()
        if event.finish_reason is not None:
            self.done.set()

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]

    def reason(self) -> str | None:
        assert self.done.wait(60)
        return self.events[-1].finish_reason


def words(engine: Engine, text: str = "What?") -> Prompt:
    assert engine.processor is not None
    return engine.processor.prepare(text)


def test_every_request_ends_with_one_last_event_that_has_the_figures(engine: Engine) -> None:
    inbox = Inbox()
    engine.submit(words(engine), SHORT, inbox)
    assert inbox.reason() == "length"
    last = inbox.events[-1]
    assert sum(event.finish_reason is not None for event in inbox.events) == 1
    assert last.usage.generation_tokens == len(inbox.tokens) == 4
    assert last.timings is not None
    assert last.timings.prefill > 0


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=12, ignore_eos=True),
        SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2, repetition_penalty=1.3),
        SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=7, stop=("e", "t")),
    ],
)
def test_a_whole_answer_is_one_event_with_all_that_the_stream_has(
    engine: Engine, sampling: SamplingParams
) -> None:
    streamed, whole = Inbox(), Inbox()
    engine.submit(words(engine), sampling, streamed)
    engine.submit(words(engine), sampling, whole, whole=True)
    assert streamed.reason() == whole.reason()
    (only,) = whole.events
    assert len(streamed.events) > 1
    assert only.text == "".join(event.text for event in streamed.events)
    assert list(only.token_ids) == streamed.tokens
    logprobs = [each.token_id for event in streamed.events for each in event.logprobs]
    assert [each.token_id for each in only.logprobs] == logprobs
    assert only.stop_string == streamed.events[-1].stop_string
    texts = [event.text for event in streamed.events]
    assert list(only.ends[:-1]) == [len("".join(texts[:i])) for i in range(1, len(only.ends))]


def test_a_whole_answer_that_is_cancelled_still_has_its_event(engine: Engine) -> None:
    stream = engine.stream(words(engine), LONG, whole=True)
    stream.cancel()
    (event,) = stream
    assert event.finish_reason == "cancelled"


def test_what_was_said_goes_out_right_before_the_next_step_computes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, seen = Inbox(), []
    run = engine.runner.run

    def watched(step: list[Scheduled], when_ready: Callable[[], None], plain: bool) -> Any:
        def ready() -> None:
            before = len(inbox.tokens)
            when_ready()
            seen.append((before, len(inbox.tokens)))

        return run(step, ready, plain)

    monkeypatch.setattr(engine.runner, "run", watched)
    engine.submit(words(engine), SHORT, inbox)
    assert inbox.reason() == "length"
    assert seen == [(0, 0), (0, 1), (1, 2), (2, 3)]


def test_a_full_queue_refuses_and_serves_again_later(engine: Engine) -> None:
    inboxes = [Inbox() for _ in range(2)]
    ids = [engine.submit(words(engine), LONG, inbox) for inbox in inboxes]
    assert all(inbox.first.wait(60) for inbox in inboxes)
    waiting = [Inbox() for _ in range(3)]
    ids += [engine.submit(words(engine), SHORT, inbox) for inbox in waiting]
    with pytest.raises(QueueFull, match="the queue holds 3"):
        engine.submit(words(engine), SHORT, Inbox())
    for request_id in ids[:2]:
        engine.cancel(request_id)
    assert [inbox.reason() for inbox in inboxes] == ["cancelled"] * 2
    assert [inbox.reason() for inbox in waiting] == ["length"] * 3
    assert len({tuple(inbox.tokens) for inbox in waiting}) == 1


def test_cancelling_while_waiting_or_twice_is_harmless(engine: Engine) -> None:
    runners = [Inbox() for _ in range(2)]
    ids = [engine.submit(words(engine), LONG, inbox) for inbox in runners]
    queued = Inbox()
    third = engine.submit(words(engine), SHORT, queued)
    engine.cancel(third)
    engine.cancel(third)
    assert queued.reason() == "cancelled"
    assert queued.tokens == []
    for request_id in (*ids, 10_000):
        engine.cancel(request_id)
    assert [inbox.reason() for inbox in runners] == ["cancelled"] * 2


def test_a_request_that_fails_leaves_the_others_alone(engine: Engine) -> None:
    alone = Inbox()
    engine.submit(words(engine), SHORT, alone)
    alone.reason()

    def broken(logits: torch.Tensor, token_ids: Any, num_prompt: int) -> torch.Tensor:
        raise ValueError("secret 0x7f0000000000")

    failing, other = Inbox(), Inbox()
    engine.submit(words(engine), SHORT, failing, [broken])
    engine.submit(words(engine), SHORT, other)
    assert failing.reason() == "error"
    error = failing.events[-1].error
    assert isinstance(error, EngineError)
    assert "secret" not in str(error)
    again = Inbox()
    engine.submit(words(engine), SHORT, again)
    assert again.reason() == "length"
    assert again.tokens == alone.tokens


def test_when_the_thread_dies_nobody_waits_for_ever(loaded: tuple[Any, Any]) -> None:
    class Fatal(BaseException):
        """Something no step is expected to raise."""

    def fatal(logits: torch.Tensor, token_ids: Any, num_prompt: int) -> torch.Tensor:
        raise Fatal

    engine = Engine(*loaded, EngineLimits(memory=1 << 24, block_size=8))
    noise = threading.excepthook
    threading.excepthook = lambda args: None
    try:
        inboxes = [Inbox(), Inbox()]
        engine.submit(words(engine), LONG, inboxes[0])
        engine.submit(words(engine), SHORT, inboxes[1], [fatal])
        assert [inbox.reason() for inbox in inboxes] == ["error", "error"]
    finally:
        threading.excepthook = noise
    with pytest.raises(EngineError):
        engine.submit(words(engine), SHORT, Inbox())
    engine.close()
    assert not engine.alive


def test_a_stream_raises_its_request_s_error(engine: Engine) -> None:
    def broken(logits: torch.Tensor, token_ids: Any, num_prompt: int) -> torch.Tensor:
        raise ValueError("broken")

    with pytest.raises(EngineError, match="ValueError"):
        list(engine.stream(words(engine), SHORT, [broken]))


def test_closing_ends_what_runs_and_refuses_what_comes(loaded: tuple[Any, Any]) -> None:
    engine = Engine(*loaded, EngineLimits(memory=1 << 24, block_size=8))
    inbox = Inbox()
    engine.submit(words(engine), LONG, inbox)
    assert inbox.first.wait(60)
    prompt = words(engine)
    engine.close()
    assert inbox.reason() == "cancelled"
    assert not engine.alive
    with pytest.raises(EngineError, match="closed"):
        engine.submit(prompt, SHORT, Inbox())


def test_the_second_question_about_a_picture_skips_the_tower_and_the_prefix(
    engine: Engine,
) -> None:
    processor = engine.processor
    assert processor is not None
    image = picture(1, 90, 70)
    questions = ["What is this?", "How many are there?"]
    prompts = [processor.prepare(text, images=[image]) for text in questions]
    fresh = []
    for prompt in prompts:
        engine.scheduler.pool.forget()
        engine.runner.encoded.clear()
        inbox = Inbox()
        engine.submit(prompt, SHORT, inbox)
        inbox.reason()
        fresh.append(inbox.tokens)
    engine.scheduler.pool.forget()
    engine.runner.encoded.clear()
    misses = engine.stats()["encoded_misses"]
    cached = []
    for prompt in prompts:
        inbox = Inbox()
        engine.submit(prompt, SHORT, inbox)
        inbox.reason()
        cached.append((inbox.tokens, inbox.events[-1].usage.cached_tokens))
    assert [tokens for tokens, _ in cached] == fresh
    assert cached[0][1] == 0
    assert cached[1][1] >= prompts[1].media[0].num_tokens
    assert engine.stats()["encoded_misses"] == misses + 1


def test_a_cache_without_room_is_refused_when_the_engine_is_made(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(InputError, match="too small"):
        Engine(*loaded, EngineLimits(memory=64))
