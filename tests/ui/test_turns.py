"""The conversation behind the page, and the flags that guard it."""

from __future__ import annotations

import sys

import pytest

from opsin.cli.ui import check_login, command
from opsin.errors import InputError, MissingDependency
from opsin.ui.turns import Turn, kind_of, messages, shown


def test_turns_become_messages_with_their_files() -> None:
    turns = [
        Turn("user", "What?", ("a.png", "b.PDF", "c.wav", "d.mp4")),
        Turn("assistant", "That.", reasoning="hm"),
        Turn("user", "And now?"),
    ]
    system, first, second, third = messages(turns, " Be brief. ")
    assert system == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in first["content"]] == [
        "image",
        "document",
        "audio",
        "video",
        "text",
    ]
    assert second == {"role": "assistant", "content": "That."}
    assert third["content"] == [{"type": "text", "text": "And now?"}]


def test_a_question_without_an_answer_is_left_out() -> None:
    turns = [Turn("user", "a"), Turn("assistant", note="It failed."), Turn("user", "b")]
    assert [message["content"][0]["text"] for message in messages(turns, "")] == ["b"]


def test_bubbles_know_their_turn() -> None:
    turns = [Turn("user", "a", ("x.png",)), Turn("assistant", "b", reasoning="hm", note="stopped")]
    bubbles, places = shown(turns)
    assert places == [0, 0, 1, 1, 1]
    assert bubbles[0]["content"] == {"path": "x.png"}
    assert bubbles[2]["metadata"] == {"title": "Thinking", "status": "done"}
    assert bubbles[4]["content"] == "*stopped*"
    assert shown([Turn("assistant")])[0] == [{"role": "assistant", "content": ""}]
    assert kind_of("a.exe") is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_machines_need_a_login(host: str) -> None:
    with pytest.raises(InputError, match="--login NAME:PASSWORD"):
        check_login(host, None)
    assert check_login(host, "ada:pass:word") == ("ada", "pass:word")


@pytest.mark.parametrize("login", ["ada", "ada:", ":x", ""])
def test_a_login_has_two_parts(login: str) -> None:
    assert check_login("127.0.0.1", None) is None
    with pytest.raises(InputError, match="NAME:PASSWORD"):
        check_login("127.0.0.1", login)


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingDependency, match=r"pip install 'opsin\[ui\]'"):
        command(host="127.0.0.1", login=None)
