"""The page in a real browser: drop, ask, see, stop, go on, and nobody else's conversation."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from opsin.errors import InputError
from opsin.ui.backends import Local, Piece
from opsin.ui.turns import Settings

from ..server.running import wait_for
from .browser import Browser, Tab, browser

pytest.importorskip("gradio", reason="Gradio is not installed")

SHAPES = Path(__file__).resolve().parents[2] / "docs" / "images" / "shapes.png"


class Scripted:
    """A backend that says what a question's first word tells it to."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.calls = 0

    def models(self) -> list[str]:
        return ["scripted", "other"]

    def state(self, model: str) -> str:
        return f"{model} is here"

    def prepare(self, model: str) -> None:
        raise InputError("This one cannot be loaded", remedy="Choose another")

    def stream(
        self, messages: Sequence[dict[str, Any]], settings: Settings
    ) -> Generator[Piece, None, None]:
        asked = messages[-1]["content"][-1]["text"]
        self.calls += 1
        if asked.startswith("fail"):
            raise InputError("The picture is odd", remedy="Turn it")
        if asked.startswith("think"):
            yield Piece(reasoning="first I ponder")
        if asked.startswith("long"):
            try:
                for number in range(100_000):
                    yield Piece(f"word{number} ")
                    threading.Event().wait(0.01)
            finally:
                self.ended.set()
        said = [m["content"][-1]["text"] for m in messages if m["role"] == "user"]
        yield Piece(f"heard {' + '.join(said)} by {settings.model}")
        yield Piece(figures="Answer: 3 tokens, 9.0 tokens/s", finish_reason="stop")


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def served(backend: Any, **how: Any) -> Iterator[str]:
    from opsin.ui.page import CSS, build, theme

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build(backend)
    page.launch(
        server_name="127.0.0.1",
        server_port=free_port(),
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        theme=theme(),
        css=CSS,
        **how,
    )
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture(scope="module")
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture(scope="module")
def url(chromium: Browser, scripted: Scripted) -> Iterator[str]:
    yield from served(scripted)


@pytest.fixture
def tab(chromium: Browser, url: str) -> Tab:
    made = chromium.tab()
    made.open(url)
    return made


def test_a_picture_is_asked_about_and_its_boxes_drawn(chromium: Browser) -> None:
    for url in served(Local("bundled")):
        tab = chromium.tab()
        tab.open(url)
        tab.wait_text("Ask about a picture")
        tab.drop_file(SHAPES)
        tab.ask("Locate the blue square in the image.")
        tab.wait_text("bbox_2d")
        tab.wait_text("tokens/s")
        drawn = "[...document.querySelectorAll('#side img')].find(i => i.naturalWidth > 0)"
        assert tab.wait(f"{drawn}?.naturalWidth") == 480
        tab.ask("What color is the triangle?")
        tab.wait_text("green")
        tab.wait("!document.querySelector('#side img')?.checkVisibility()")
        assert tab.wait_text("loaded") is None


def test_stop_ends_the_answer_and_the_next_one_comes(tab: Tab, scripted: Scripted) -> None:
    tab.ask("long story")
    tab.wait_text("word3 ")
    tab.run("document.querySelector('#box .stop-button').click()")
    tab.wait_text("stopped")
    assert scripted.ended.wait(30)
    tab.ask("second")
    tab.wait_text("heard long story + second by scripted")


def test_an_error_is_shown_in_words_and_goes_on(tab: Tab) -> None:
    tab.ask("fail please")
    tab.wait_text("The picture is odd. Turn it.")
    tab.ask("again")
    tab.wait_text("heard again by scripted")
    tab.run("[...document.querySelectorAll('button')].find(b => b.innerText == 'Load now').click()")
    tab.wait_text("This one cannot be loaded. Choose another.")


def test_reasoning_is_folded_and_a_conversation_begins_anew(tab: Tab) -> None:
    tab.ask("think of it")
    tab.wait_text("Thinking")
    tab.wait_text("heard think of it")
    script = "[...document.querySelectorAll('button')].find(b => b.innerText == '{}').click()"
    tab.run(script.format("New conversation"))
    tab.wait_text("Ask about a picture")
    tab.ask("fresh")
    tab.wait_text("heard fresh by scripted")


def test_an_answer_can_be_asked_for_again_and_a_question_changed(
    tab: Tab, scripted: Scripted
) -> None:
    tab.ask("one")
    tab.wait_text("heard one by scripted")
    tab.ask("two")
    tab.wait_text("heard one + two by scripted")
    tab.wait("document.querySelector('#box .submit-button') !== null")
    before = scripted.calls
    click(tab, "#chat button[title=Retry], #chat button[aria-label=Retry]")
    wait_for(lambda: scripted.calls == before + 1)
    tab.wait("document.body.innerText.split('heard one + two').length == 2")
    tab.wait("document.querySelector('#box .submit-button') !== null")
    edit = "#chat button[title=Edit], #chat button[aria-label=Edit]"
    click(tab, edit, "document.querySelector('#chat textarea') !== null")
    tab.run("document.querySelector('#chat textarea').select()")
    tab.send("Input.insertText", text="three")
    submit = "#chat button[title=Submit], #chat button[aria-label=Submit]"
    click(tab, submit, "document.body.innerText.includes('heard three by scripted')")
    assert "heard one" not in tab.text()


def click(tab: Tab, selector: str, then: str = "true") -> None:
    """Click the first of the elements until something comes of it.

    A click is lost where the page draws the element again meanwhile.
    """
    for _ in range(10):
        tab.wait(f"document.querySelector('{selector}') !== null")
        tab.run(f"document.querySelector('{selector}').click()")
        if tab.comes(then, 3):
            return
    raise AssertionError(then)


def test_two_visitors_do_not_mix(chromium: Browser, url: str) -> None:
    first, second = chromium.tab(), chromium.tab()
    first.open(url)
    second.open(url)
    first.ask("apples")
    second.ask("pears")
    first.wait_text("heard apples by")
    second.wait_text("heard pears by")
    first.ask("more")
    second.ask("less")
    first.wait_text("heard apples + more")
    second.wait_text("heard pears + less")
    assert "pears" not in first.text()
    assert "apples" not in second.text()


def test_a_narrow_screen_shows_the_conversation_first(chromium: Browser, url: str) -> None:
    tab = chromium.tab()
    tab.open(url, 390, 844)
    tab.wait("document.querySelector('.sidebar').getBoundingClientRect().right <= 10")
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.ask("small")
    tab.wait_text("heard small by")


def test_a_narrow_screen_brings_the_drawn_picture_into_sight(chromium: Browser) -> None:
    for url in served(Local("bundled")):
        tab = chromium.tab()
        tab.open(url, 390, 844)
        tab.drop_file(SHAPES)
        tab.ask("Locate the blue square in the image.")
        drawn = "[...document.querySelectorAll('#side img')].find(i => i.naturalWidth > 0)"
        tab.wait(f"{drawn}?.getBoundingClientRect().top < window.innerHeight - 100")


def test_nothing_is_fetched_from_elsewhere(tab: Tab) -> None:
    names = tab.run("performance.getEntriesByType('resource').map(e => new URL(e.name).hostname)")
    assert set(names) == {"127.0.0.1"}


def test_a_login_guards_the_page(scripted: Scripted) -> None:
    for url in served(scripted, auth=("ada", "secret")):
        with httpx.Client(base_url=url, trust_env=False) as client:
            assert client.get("config").status_code == 401
            wrong = client.post("login", data={"username": "ada", "password": "x"})
            assert wrong.status_code == 400
            client.post("login", data={"username": "ada", "password": "secret"})
            assert client.get("config").status_code == 200
