"""Answers for the page: from this process and from a server, the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from opsin.errors import EngineError, OpsinError
from opsin.ui import backends
from opsin.ui.backends import Backend, Local, Piece, Remote
from opsin.ui.turns import Settings, Turn, messages

from ..server.running import serving

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
ASK = Settings("bundled", max_tokens=200)


@pytest.fixture(scope="module")
def local() -> Local:
    return Local("bundled")


@pytest.fixture(scope="module")
def remote() -> Iterator[Remote]:
    with serving(None, memory=2**26) as running:
        yield Remote(f"{running.url}/v1")


@pytest.fixture(params=["local", "remote"])
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.getfixturevalue(request.param)
    return made


def ask(backend: Backend, settings: Settings, *turns: Turn) -> list[Piece]:
    return list(backend.stream(messages(turns, ""), settings))


def test_two_turns_and_the_boxes(backend: Backend) -> None:
    name = backend.models()[0]
    settings = Settings(name, max_tokens=200)
    picture = Turn("user", "Locate the blue square in the image.", (str(IMAGES / "shapes.png"),))
    pieces = ask(backend, settings, picture)
    text = "".join(piece.text for piece in pieces)
    assert "blue square" in text
    assert len(pieces) > 3
    (drawn,) = pieces[-1].pictures
    assert drawn.size == (480, 320)
    assert pieces[-1].finish_reason == "stop"
    assert "tokens/s" in pieces[-1].figures
    answered = Turn("assistant", text)
    pieces = ask(backend, settings, picture, answered, Turn("user", "What color is the triangle?"))
    assert "".join(piece.text for piece in pieces) == "green"
    assert pieces[-1].pictures == ()


def test_errors_come_in_words(backend: Backend) -> None:
    sound = Turn("user", "What is said?", (str(IMAGES / "note.png").replace("png", "wav"),))
    with pytest.raises((OpsinError, OSError)):
        ask(backend, Settings(backend.models()[0]), sound)
    with pytest.raises(OpsinError, match="no-such-model"):
        ask(backend, Settings("no-such-model"), Turn("user", "x"))


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(EngineError, match="cannot be reached"):
        Remote("http://127.0.0.1:9/v1").models()


def test_closing_an_answer_ends_it(local: Local) -> None:
    stream = local.stream(messages([Turn("user", "Hello")], ""), ASK)
    next(stream)
    stream.close()
    assert local._busy["bundled"] == 0


def test_a_model_that_nobody_uses_makes_room(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Loaded:
        engine = None

    def load(name: str, **options: object) -> tuple[Loaded, None]:
        made.append(name)
        return Loaded(), None

    monkeypatch.setattr(backends, "load", load)
    several = Local("a")
    with several._using("a"):
        for name in ("b", "c", "a", "d"):
            several.prepare(name)
        assert several.state("a") == "loaded"
    assert made == ["a", "b", "c", "d"]
    assert [several.state(name) == "loaded" for name in "abcd"] == [True, False, False, True]
