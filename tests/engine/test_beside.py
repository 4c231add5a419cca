"""A picture encoded beside the prompt before it: the same answers, and it ends with its request."""

from __future__ import annotations

import dataclasses
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import opsin
from opsin.engine import model as loading
from opsin.engine import packing
from opsin.engine.encoding import Sliced
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.model import Model, library_to_share
from opsin.errors import EngineError
from opsin.families.base import Encoded, MediaInput, Prompt
from opsin.kernels import cpu
from opsin.types import SamplingParams
from tests.families.checkpoints import write_checkpoint
from tests.families.pictures import picture
from tests.families.zoo import CASES

from .test_loop import LONG, Inbox

pytestmark = pytest.mark.skipif(cpu.load() is None, reason=f"not built: {cpu.why_missing()}")

COVERED = ("qwen3_vl-saved_untied", "internvl-small")
SCORED = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2)


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any]:
    """A model on four threads, whose small matrices are quantised too if any are."""
    monkeypatch.setattr(packing, "LEAST_ROWS", 1)
    monkeypatch.setattr(loading, "native_library", lambda: cpu.load(threads=4))
    return opsin.load(folder, device="cpu", dtype="bfloat16", **options)


@pytest.fixture(scope="module", params=[case for case in CASES if case.name in COVERED], ids=str)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Any]]:
    folder = write_checkpoint(request.param, tmp_path_factory.mktemp(request.param.name))
    with pytest.MonkeyPatch.context() as patch:
        yield load(folder, patch, quantize=8)
    cpu.load()


@pytest.fixture(autouse=True)
def small_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsin.engine.encoding.BESIDE_SECONDS", 0.0)
    monkeypatch.setattr("opsin.engine.scheduler.LEAST_TOKENS", 8)


def engine_of(loaded: tuple[Any, Any]) -> Engine:
    keeps = {"prefix_cache": False, "media_cache": 0}
    return Engine(*loaded, EngineLimits(max_num_seqs=4, memory=1 << 24, block_size=8, **keeps))


@pytest.fixture
def engine(loaded: tuple[Any, Any]) -> Iterator[Engine]:
    with engine_of(loaded) as engine:
        yield engine
        assert not engine.encoder.sliced.busy
        assert engine.encoder.library is not None
        assert engine.encoder.library.threads == 4
        engine.scheduler.pool.forget()
        engine.scheduler.check_integrity()


def shown(engine: Engine, count: int = 3) -> Prompt:
    assert engine.processor is not None
    pictures = [picture(seed, 96, 64) for seed in range(count)]
    return engine.processor.prepare("What are they?", images=pictures)


def answer(engine: Engine, prompt: Prompt) -> Inbox:
    inbox = Inbox()
    engine.submit(prompt, SCORED, inbox)
    assert inbox.reason() == "length"
    return inbox


def scores(inbox: Inbox) -> list[Any]:
    return [logprob for event in inbox.events for logprob in event.logprobs or ()]


class Watched:
    """A model whose towers say when they begin; a step's layers run on once `until` is true."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began: list[threading.Event] = [threading.Event() for _ in range(3)]
        self.during: list[int] = []  # towers that had begun when each step's layers were over
        self.until: Callable[[], object] = lambda: None
        self.num_begun = self.num_done = 0
        family, native = model.family, model.decoder.native
        assert native is not None
        encode, compute = family.encode, native.compute

        def encodes(towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
            self.num_begun += 1
            self.began[self.num_begun - 1].set()
            result = encode(towers, items)
            self.num_done += 1
            return result

        def computes(step: Any, cache: Any, when_ready: Callable[[], None]) -> Any:
            def ready() -> None:
                when_ready()
                self.until()

            result = compute(step, cache, ready)
            self.during.append(self.num_begun)
            return result

        monkeypatch.setattr(family, "encode", encodes)
        monkeypatch.setattr(native, "compute", computes)


def test_pictures_are_encoded_beside_what_comes_before_them(
    loaded: tuple[Any, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = loaded[0], shown(engine)
    with monkeypatch.context() as patch:
        patch.setattr(model, "shared_library", None)
        with engine_of(loaded) as turns:
            assert turns.encoder.library is None
            expected = answer(turns, prompt)
    learnt: list[int] = []
    monkeypatch.setattr(
        engine.scheduler.pace, "observe", lambda tokens, seconds: learnt.append(tokens)
    )
    watched = Watched(model, monkeypatch)
    waits = iter(watched.began[1:])

    def wait() -> None:
        following = next(waits, None)
        assert following is None or following.wait(60)

    watched.until = wait
    inbox = answer(engine, prompt)
    assert watched.during[:3] == [2, 3, 3]
    assert (inbox.tokens, scores(inbox)) == (expected.tokens, scores(expected))
    timings = inbox.events[-1].timings
    assert timings is not None
    assert timings.encode > 0
    assert timings.prefill > 0
    assert len(learnt) == len(watched.during) - 2  # not from the steps beside which towers ran
    inner = prompt.media[2].indices
    assert sum(learnt) == len(prompt.token_ids) - int(inner[0]) - 1


def test_others_have_the_threads_again_and_answer_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.processor is not None
    words = engine.processor.prepare("Say something of some length, and of no weight at all")
    alone = answer(engine, words), answer(engine, shown(engine))
    writing, text, seen = Inbox(), Inbox(), Inbox()
    written = engine.submit(words, LONG, writing)
    assert writing.first.wait(60)
    engine.submit(shown(engine), SCORED, seen)
    engine.submit(words, SCORED, text)
    assert (text.reason(), seen.reason()) == ("length", "length")
    engine.cancel(written)
    assert writing.reason() == "cancelled"
    assert [(each.tokens, scores(each)) for each in (text, seen)] == [
        (each.tokens, scores(each)) for each in alone
    ]


def test_a_picture_that_fails_beside_a_step_fails_its_request_alone(
    loaded: tuple[Any, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.processor is not None
    words = engine.processor.prepare("Say something")
    alone = answer(engine, words)
    watched = Watched(loaded[0], monkeypatch)
    encode = loaded[0].family.encode
    failed = threading.Event()

    def breaks(towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        result = encode(towers, items)
        if watched.num_begun == 2:
            failed.set()
            raise ValueError("no such picture")
        return result

    monkeypatch.setattr(loaded[0].family, "encode", breaks)
    watched.until = lambda: engine.encoder._beside and watched.num_begun > 1 and failed.wait(60)
    text, seen = Inbox(), Inbox()
    engine.submit(shown(engine), SCORED, seen)
    engine.submit(words, SCORED, text)
    assert seen.reason() == "error"
    assert isinstance(seen.events[-1].error, EngineError)
    assert seen.tokens == []
    assert text.reason() == "length"
    assert text.tokens == alone.tokens
    assert failed.is_set()


@pytest.mark.parametrize("closes", [False, True])
def test_a_request_that_ends_ends_its_next_picture(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, closes: bool
) -> None:
    engine = engine_of(loaded)
    watched = Watched(loaded[0], monkeypatch)
    seen = Inbox()

    def hold(*_: object) -> None:
        while watched.num_begun == 2 and engine.encoder.sliced._until:
            pass  # as long as the step's layers run

    def leave() -> None:
        assert watched.began[1].wait(60)
        if closes:
            closing.start()
            while not engine._closing:
                pass
        else:
            engine.cancel(number)

    closing = threading.Thread(target=engine.close)
    hooks = [each.register_forward_pre_hook(hold) for each in loaded[0].towers.modules()]
    known = threading.Event()
    watched.until = lambda: known.wait(60) and leave()
    number = engine.submit(shown(engine), SCORED, seen)
    known.set()
    assert seen.reason() == "cancelled"
    for hook in hooks:
        hook.remove()
    assert (len(watched.during), watched.num_begun, watched.num_done) == (1, 2, 1)
    if closes:
        closing.join(60)
    else:
        watched.until = lambda: None
        watched.num_begun = 0
        assert answer(engine, shown(engine)).tokens
        engine.scheduler.pool.forget()
        engine.scheduler.check_integrity()
        engine.close()
    assert not engine.encoder.sliced.busy
    assert engine.encoder.library is not None
    assert engine.encoder.library.threads == 4


def test_what_goes_on_beside_its_own_prompt_is_among_its_prefill(
    loaded: tuple[Any, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, slow = Watched(loaded[0], monkeypatch), 0.5
    encode = loaded[0].family.encode

    def dawdles(towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        if watched.num_begun == 1:
            time.sleep(slow)
        return encode(towers, items)

    monkeypatch.setattr(loaded[0].family, "encode", dawdles)
    timings = answer(engine, shown(engine, 2)).events[-1].timings
    assert watched.num_done == 2
    assert timings is not None
    assert timings.prefill >= slow
    assert timings.encode > 0


@pytest.mark.parametrize("cancels", [False, True])
def test_the_pixels_of_a_request_go_when_it_ends(
    loaded: tuple[Any, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch, cancels: bool
) -> None:
    watched, seen, gone = Watched(loaded[0], monkeypatch), Inbox(), threading.Event()
    prompt, known = shown(engine), threading.Event()
    copied = {name: value.clone() for name, value in prompt.media[1].features.items()}
    weakref.finalize(next(iter(copied.values())), gone.set)
    prompt.media[1] = dataclasses.replace(prompt.media[1], features=copied)
    del copied

    def leave() -> None:
        assert known.wait(60)
        assert watched.began[1].wait(60)
        if cancels:
            engine.cancel(number)

    watched.until = leave
    number = engine.submit(prompt, SCORED, seen)
    del prompt
    known.set()
    assert seen.reason() == ("cancelled" if cancels else "length")
    assert gone.wait(10), "the engine keeps them while it waits for the next request"


def test_steps_that_only_generate_have_all_threads(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    original = engine.encoder.sliced.begin_beside

    def begins() -> None:
        begun.append(engine.steps)
        original()

    monkeypatch.setattr(engine.encoder.sliced, "begin_beside", begins)
    assert answer(engine, shown(engine, 2)).tokens
    assert len(begun) == 1
    assert answer(engine, shown(engine, 1)).tokens
    assert len(begun) == 1


def test_steps_that_are_soon_over_have_all_threads(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[None] = []
    monkeypatch.setattr(engine.encoder.sliced, "begin_beside", lambda: begun.append(None))
    monkeypatch.setattr("opsin.engine.encoding.BESIDE_SECONDS", 60.0)
    assert answer(engine, shown(engine)).tokens
    assert not begun


def test_work_goes_on_beside_the_caller_and_tells_its_error_later() -> None:
    library = cpu.load(threads=2)
    assert library is not None
    modules, threads = nn.Sequential(nn.Identity(), nn.Identity()), list[int]()
    sliced, go = Sliced(modules, library), threading.Event()

    def work() -> None:
        threads.append(library.threads)
        assert go.wait(60)
        modules(torch.zeros(1))
        raise ValueError("it went wrong")

    sliced.start(work)
    sliced.begin_beside()
    assert library.threads == 1
    go.set()
    while not sliced.ended:
        pass
    sliced.end_beside()
    assert (library.threads, threads) == (2, [1])
    assert sliced.busy
    with pytest.raises(ValueError, match="it went wrong"):
        sliced.advance(0.0)
    assert not sliced.busy
    sliced.start(work)
    sliced.begin_beside()
    sliced.end_beside()
    sliced.close()
    cpu.load()


def test_threads_are_shared_where_towers_multiply_natively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in CASES if case.name == "qwen3_vl-saved_untied")
    folder = write_checkpoint(case, tmp_path)
    library = cpu.load(threads=4)
    assert library is not None
    quantised, _ = load(folder, monkeypatch, quantize=4)
    assert quantised.shared_library is library
    plain, _ = load(folder, monkeypatch)
    native = plain.arithmetic.has_native_products
    assert (plain.shared_library is library) == native
    monkeypatch.setattr(plain.arithmetic, "has_native_products", True)
    assert library_to_share(library, plain, {}) is library
    monkeypatch.setattr(plain.arithmetic, "has_native_products", False)
    assert library_to_share(library, plain, {}) is None
    monkeypatch.setattr(plain.arithmetic, "has_native_products", True)
    cpu.load(threads=3)
    assert library_to_share(library, plain, {}) is None
    cpu.load()
