"""Towers in slices: others go on meanwhile, answers stay the same, and what ends ends at once."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import opsin
from opsin.engine.encoding import Sliced
from opsin.engine.loop import Engine, EngineLimits
from opsin.errors import EngineError
from opsin.families.base import Encoded, MediaInput, Prompt
from opsin.types import SamplingParams
from tests.families.checkpoints import write_checkpoint
from tests.families.pictures import picture
from tests.families.zoo.qwen import CASES

from .test_loop import LONG, Inbox

ANSWER = SamplingParams(max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    case = next(case for case in CASES if case.family == "qwen3_vl")
    folder: Path = write_checkpoint(case, tmp_path_factory.mktemp("encoding"))
    return opsin.load(str(folder), device="cpu")


@pytest.fixture
def engine(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine that goes on with others at every module of a tower."""
    monkeypatch.setattr("opsin.engine.encoding.SLICE_SECONDS", 0.0)
    keeps = {"prefix_cache": False, "media_cache": 0}
    limits = EngineLimits(max_num_seqs=4, memory=1 << 24, block_size=8, **keeps)
    with Engine(*loaded, limits) as engine:
        yield engine
        assert not engine.encoder.sliced.busy
        engine.scheduler.pool.forget()
        engine.scheduler.check_integrity()


def words(engine: Engine) -> Prompt:
    assert engine.processor is not None
    return engine.processor.prepare("Say something")


def shown(engine: Engine, seed: int = 1) -> Prompt:
    assert engine.processor is not None
    return engine.processor.prepare("What is it?", images=[picture(seed, 96, 64)])


class Watched:
    """A family's encode that notes the engine's steps before and after, and may do more."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.family = engine, engine.model.family
        self.steps: list[tuple[int, int]] = []
        self.begun = 0
        original = self.family.encode

        def encode(towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
            self.begun += 1
            before = engine.steps
            result = original(towers, items)
            self.steps.append((before, engine.steps))
            return result

        monkeypatch.setattr(self.family, "encode", encode)


def test_row_25_others_generate_while_a_picture_is_encoded(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [inbox_of(engine, prompt).tokens for prompt in (shown(engine), shown(engine, 2))]
    watched = Watched(engine, monkeypatch)
    text, first, second = Inbox(), Inbox(), Inbox()
    written = engine.submit(words(engine), LONG, text)
    assert text.first.wait(60)
    engine.submit(shown(engine), ANSWER, first)
    engine.submit(shown(engine, 2), ANSWER, second)
    assert (first.reason(), second.reason()) == ("length", "length")
    engine.cancel(written)
    assert text.reason() == "cancelled"
    modules = sum(1 for _ in engine.model.towers.modules())
    assert [first.tokens, second.tokens] == alone
    assert len(watched.steps) == 2
    for before, after in watched.steps:
        assert after - before > modules // 2


def test_each_picture_is_encoded_by_itself_whoever_comes_with_it(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    counts: list[int] = []
    original = model.family.encode

    def encode(towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        counts.append(len(items))
        return original(towers, items)

    monkeypatch.setattr(model.family, "encode", encode)
    pictures = [picture(seed, 96, 64) for seed in range(3)]
    prompt = processor.prepare("What are they?", images=pictures)
    with Engine(model, processor, EngineLimits(memory=1 << 24, block_size=8)) as engine:
        assert inbox_of(engine, prompt).tokens
        engine.scheduler.pool.forget()
    assert counts == [1, 1, 1]


def inbox_of(engine: Engine, prompt: Prompt) -> Inbox:
    inbox = Inbox()
    engine.submit(prompt, ANSWER, inbox)
    assert inbox.reason() == "length"
    return inbox


def test_a_tower_that_fails_fails_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = inbox_of(engine, words(engine)).tokens
    family = engine.model.family

    def broken(towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        next(iter(towers.values()))(torch.zeros(1))
        return []

    text, seen = Inbox(), Inbox()
    with monkeypatch.context() as patch:
        patch.setattr(family, "encode", broken)
        engine.submit(words(engine), ANSWER, text)
        engine.submit(shown(engine), ANSWER, seen)
        assert seen.reason() == "error"
    assert isinstance(seen.events[-1].error, EngineError)
    assert text.reason() == "length"
    assert text.tokens == alone
    assert inbox_of(engine, shown(engine)).tokens


def test_row_30_a_cancelled_request_ends_its_tower(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(engine, monkeypatch)
    seen = Inbox()
    last = list(engine.model.towers.modules())[-1]
    ids: list[int] = []
    known = threading.Event()

    def leave(*_: object) -> None:
        assert known.wait(60)
        engine.cancel(ids[0])

    first = next(iter(engine.model.towers.values()))
    reached: list[object] = []
    hooks = [
        first.register_forward_pre_hook(leave),
        last.register_forward_pre_hook(lambda *_: reached.append(1)),
    ]
    ids.append(engine.submit(shown(engine), ANSWER, seen))
    known.set()
    assert seen.reason() == "cancelled"
    for hook in hooks:
        hook.remove()
    assert inbox_of(engine, words(engine)).tokens
    assert (watched.begun, watched.steps, reached) == (1, [], [])


def test_closing_ends_a_tower(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.engine.encoding.SLICE_SECONDS", 0.0)
    engine = Engine(*loaded, EngineLimits(memory=1 << 24, block_size=8))
    watched = Watched(engine, monkeypatch)
    inside, go, seen = threading.Event(), threading.Event(), Inbox()

    def hold(*_: object) -> None:
        inside.set()
        assert go.wait(60)

    hook = next(iter(engine.model.towers.values())).register_forward_pre_hook(hold)
    engine.submit(shown(engine), ANSWER, seen)
    assert inside.wait(60)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closing:
        pass
    go.set()
    closing.join(60)
    hook.remove()
    assert seen.reason() == "cancelled"
    assert (watched.begun, watched.steps) == (1, [])


def test_work_stops_at_modules_and_its_errors_come_through() -> None:
    modules = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity())
    sliced, x = Sliced(modules), torch.zeros(1)
    done: list[int] = []

    def work() -> None:
        modules(x)
        done.append(1)

    sliced.start(work)
    slices = 0
    while sliced.busy:
        sliced.advance(0.0)
        slices += 1
    assert (slices, done) == (5, [1])  # before each of four modules, and the rest
    sliced.start(work)
    sliced.advance(60.0)
    assert (sliced.busy, done) == (False, [1, 1])
    sliced.start(lambda: {}["nothing"])
    with pytest.raises(KeyError):
        sliced.advance(0.0)
    sliced.start(work)
    sliced.advance(0.0)
    sliced.abandon()
    sliced.start(work)
    sliced.close()
    assert done == [1, 1]
    assert not modules[0]._forward_pre_hooks


def test_encoding_is_no_part_of_the_time_in_the_queue(engine: Engine) -> None:
    inbox = Inbox()
    engine.submit(shown(engine, seed=9), ANSWER, inbox)
    assert inbox.reason() == "length"
    timings = inbox.events[-1].timings
    assert timings is not None
    assert timings.encode > 0
    assert timings.prefill > 0


def test_the_pixels_of_a_request_go_when_it_ends(engine: Engine) -> None:
    prompt, gone = shown(engine, 9), threading.Event()
    features = {name: value.clone() for name, value in prompt.media[0].features.items()}
    weakref.finalize(features["pixel_values"], gone.set)
    prompt.media[0] = dataclasses.replace(prompt.media[0], features=features)
    del features
    for _ in engine.stream(prompt, ANSWER):
        pass
    del prompt
    assert gone.wait(10.0), "the engine keeps them while it waits for the next request"
