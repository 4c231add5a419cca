"""`opsin chat`: a person at a terminal (a pty), and the parts that need none."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

import opsin
from opsin.cli.chat_screen import Answer, preview, preview_protocol, sixel, split_blocks
from opsin.cli.chat_session import Commands, Session, kind_of, split_pasted
from opsin.errors import InputError
from opsin.types import Text
from tests.media.papers import filled, pdf
from tests.media.samples import picture

ROOT = Path(__file__).resolve().parents[2]
RECEIPT = "docs/images/receipt.png"
ENDLESS = """
import sys
from types import SimpleNamespace as Result
from opsin.cli.chat import Chat
from opsin.cli.chat_session import Session

def generate(messages):
    if messages[-1].text == "short":
        yield Result(text="", reasoning="Let me count.", finish_reason=None)
        yield Result(text=f"after {len(messages)}", reasoning="", finish_reason="stop")
        return
    while True:
        yield Result(text="word ", reasoning="", finish_reason=None)

Chat(Session(("image",)), generate).run()
"""


class Terminal:
    """A process in a pty, and what it has written."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.fd, child = pty.openpty()
        kept = {name: value for name, value in os.environ.items() if name not in ("TMUX", "STY")}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**kept, "COLUMNS": "100", **environment},
            cwd=ROOT,
            start_new_session=True,
            # Commands that a shell starts in the background ignore Ctrl-C, and so would this one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(child)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Return once the text was written; what stood before it is not looked at again."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} is not in {self.seen[-2000:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                self.seen += os.read(self.fd, 65536).decode("utf-8", "replace")
        self.seen = self.seen.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def interrupt(self) -> None:
        """What a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, signal.SIGINT)

    def interrupt_until(self, text: str) -> None:
        """Ctrl-C again until it is heard: just after a prompt, readline may not be waiting yet."""
        for _ in range(60):
            self.interrupt()
            if select.select([self.fd], [], [], 1)[0]:
                break
        self.wait_for(text)


@contextmanager
def terminal(*command: str, **environment: str) -> Iterator[Terminal]:
    made = Terminal(list(command), **environment)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        os.close(made.fd)


def test_several_turns_about_a_picture_in_a_terminal(tmp_path: Path) -> None:
    about = {"OPSIN_CACHE": str(tmp_path), "TERM": "xterm-kitty"}
    with terminal("-m", "opsin", "chat", **about) as it:
        it.wait_for("> ")
        it.type(f"/image {RECEIPT}\n")
        it.wait_for("Attached receipt.png")
        it.wait_for("\x1b_Gf=100,a=T,m=")
        it.wait_for("> ")
        it.type("What is the total?\n")
        it.wait_for("$17.01")
        it.wait_for("> ")
        it.type("How much is the tax?\n")
        it.wait_for("$1.26")
        it.type(f"/save {tmp_path / 'chat.json'}\n")
        it.wait_for("Saved")
        it.wait_for("> ")
        it.type("\x04")
        assert it.process.wait(30) == 0
    history = (tmp_path / "chat_history").read_text(encoding="utf-8")
    assert "What is the total?" in history
    messages = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    model, processor = opsin.load("bundled")
    messages[0]["content"][0]["image"] = str(ROOT / RECEIPT)
    again = opsin.generate(model, processor, messages[:3])
    assert again.text == "$1.26"


def test_ctrl_c_ends_the_answer_and_nothing_else(tmp_path: Path) -> None:
    with terminal("-c", ENDLESS, OPSIN_CACHE=str(tmp_path), TERM="xterm") as it:
        it.wait_for("> ")
        it.type("go\n")
        it.wait_for("word word")
        it.interrupt()
        it.wait_for("(stopped)")
        it.wait_for("> ")
        it.type("short\n")
        it.wait_for("s; /thinking shows it)")
        it.wait_for("after 3")
        it.wait_for("> ")
        it.type("/thinking\n")
        it.wait_for("Let me count.")
        it.wait_for("> ")
        it.interrupt_until("leaves")
        it.wait_for("> ")
        it.type("\x04")
        assert it.process.wait(30) == 0


DROPPED = """
import signal
from types import SimpleNamespace as Result
from opsin.cli.chat import Chat
from opsin.cli.chat_session import Session

class Noisy:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def generate(messages):
    noisy = Noisy()
    while True:
        yield Result(text="word ", reasoning="", finish_reason=None)
        noisy = None

Chat(Session(("image",)), generate).run()
"""


def test_ctrl_c_is_heard_where_python_drops_what_it_raises(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DROPPED],
        input="go\n/clear\n",
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OPSIN_CACHE": str(tmp_path)},
    )
    assert "Exception ignored in" in done.stderr
    assert done.stdout == "word word \n"
    assert done.stderr.endswith("(stopped)\nThe conversation is empty again.\n")


def test_lines_from_a_pipe_are_answered_without_prompts(tmp_path: Path) -> None:
    lines = f"{RECEIPT} What is the total?\nHow much\\\nis the tax?\n/clear\n/exit\nnever\n"
    done = subprocess.run(
        [sys.executable, "-m", "opsin", "chat"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OPSIN_CACHE": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "$17.01\n$1.26\n"
    assert done.stderr.endswith("Attached receipt.png.\nThe conversation is empty again.\n")


def test_a_line_from_a_pipe_that_cannot_be_obeyed_fails_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "opsin", "chat"],
        input=f"/image gone.png\n{RECEIPT} What is the total?\n/help\n",
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OPSIN_CACHE": str(tmp_path)},
    )
    assert done.returncode == 1
    assert done.stdout.startswith("$17.01\n  /image FILE...")
    assert "gone.png was not read: there is no such file" in done.stderr


def commands(*modalities: str) -> tuple[Commands, Session, list[str]]:
    session = Session(modalities)
    said: list[str] = []
    return Commands(session, said.append, said.append, lambda attached: None), session, said


def test_commands_change_the_conversation(tmp_path: Path) -> None:
    run, session, said = commands("image")
    (tmp_path / "a b.pdf").write_bytes(pdf([filled(1, 0, 0), filled(0, 1, 0)]))
    assert run.run(f"/image {tmp_path / 'a b.pdf'}")
    assert said == ["Attached a b.pdf (2 pages)."]
    run.run("/system Be brief.")
    messages = session.ask("What is it?")
    assert [message.role for message in messages] == ["system", "user"]
    assert [item.options["page"] for item in messages[1].media] == [1, 2]
    session.answered("Colours.")
    assert len(session.ask("More?")) == 4
    session.failed()
    run.run(f"/save {tmp_path / 'talk.md'}")
    text = (tmp_path / "talk.md").read_text(encoding="utf-8")
    assert text.startswith("## System\n\nBe brief.\n\n## User\n\n*image: ")
    assert text.endswith("What is it?\n\n## Assistant\n\nColours.\n")
    held = json.loads(session.json())
    assert held[1]["content"][1]["pages"] == [2]
    run.run("/clear")
    assert (session.turns, session.system) == ([], "Be brief.")
    run.run("/system")
    assert session.system is None
    session.thoughts = "First, colours."
    run.run("/thinking")
    run.run("/clear")
    run.run("/thinking")
    assert said[-3] == "First, colours."
    assert said[-1].startswith("It did not think")
    run.run("/help")
    assert any("/save FILE" in line for line in said)
    assert not run.run("/exit")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/image", "Name a file"),
        ("/image gone.png", "there is no such file"),
        ("/audio a.wav", "does not take audio: it takes text, image"),
        ("/video gone.mp4", "does not take video"),
        ("/save", "Name a file"),
        ("/save no/such/folder/x", "cannot be written"),
        ("/fly", "no command /fly"),
    ],
)
def test_what_cannot_be_done_is_said(line: str, says: str) -> None:
    run, session, said = commands("image")
    assert run.run(line)
    assert says in said[-1]
    assert run.refused == 1
    assert session.attached == []


def test_pasted_paths_are_found(tmp_path: Path) -> None:
    path = tmp_path / "my photo.png"
    picture().save(path)
    quoted, escaped = f"'{path}'", str(path).replace(" ", "\\ ")
    assert split_pasted(f"{quoted} what is this") == ([("image", str(path))], "what is this")
    assert split_pasted(escaped) == ([("image", str(path))], "")
    assert split_pasted("what's gone.png?") == ([], "what's gone.png?")
    assert split_pasted("the  spaces   stay") == ([], "the  spaces   stay")
    assert kind_of(str(tmp_path)) is None
    with pytest.raises(InputError, match="does not take image"):
        Session(()).attach("image", str(path))


def test_a_failed_message_is_taken_back() -> None:
    session = Session(("image",))
    session.ask("one")
    session.failed()
    assert session.ask("two")[0].content == (Text("two"),)


def test_markdown_is_cut_between_blocks() -> None:
    assert split_blocks("one\ntwo") == ("", "one\ntwo")
    assert split_blocks("one\n\ntwo") == ("one\n\n", "two")
    fenced = "a\n\n```py\nx = 1\n\ny = 2\n"
    assert split_blocks(fenced) == ("a\n\n", fenced[3:])
    assert split_blocks(fenced + "```\n\nb") == (fenced + "```\n\n", "b")


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_is_shown_once_whatever_its_pieces(size: int) -> None:
    text = "# Head\n\nsome *words* here\n\n```py\nx = 1\n\ny = 2\n```\n\nthe end"
    out = io.StringIO()
    answer = Answer(Console(file=out, width=60, force_terminal=True, legacy_windows=False))
    for at in range(0, len(text), size):
        answer.push(text[at : at + size])
    answer.close()
    assert answer.text == text
    final = screen(out.getvalue())
    assert final.count("Head") == 1
    assert final.count("y = 2") == 1
    assert "some words here" in final
    assert final.rstrip().endswith("the end")


@pytest.mark.parametrize("size", [3, 17])
def test_reasoning_is_seen_while_it_comes_and_folded_then(size: int) -> None:
    thoughts = "\n".join(f"step {number} of many" for number in range(9))
    out = io.StringIO()
    answer = Answer(Console(file=out, width=60, force_terminal=True, legacy_windows=False))
    for at in range(0, len(thoughts), size):
        answer._drawn = 0.0
        answer.think(thoughts[at : at + size])
    seen = screen(out.getvalue())
    assert "Thinking..." in seen
    assert "step 8 of many" in seen
    assert "step 3" not in seen
    answer.push("It is nine.")
    answer.close()
    final = screen(out.getvalue())
    assert re.fullmatch(r"\(thought for \d+ s; /thinking shows it\)\s+It is nine\.\s*", final)
    assert answer.thoughts == thoughts


@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_pipe_gets_the_answer_and_stderr_the_reasoning(ending: str) -> None:
    out, aside = io.StringIO(), io.StringIO()
    answer = Answer(Console(file=out), Console(file=aside))
    answer.think("Let me ")
    answer.think(f"see [it].{ending}")
    answer.push("Nine.")
    answer.close()
    assert (out.getvalue(), aside.getvalue()) == ("Nine.\n", "Let me see [it].\n")


def test_reasoning_stays_whole_where_nobody_can_ask_for_it() -> None:
    out = io.StringIO()
    console = Console(file=out, width=60, force_terminal=True, legacy_windows=False)
    answer = Answer(console, folds=False)
    thoughts = "\n".join(f"step {number} of many" for number in range(9))
    answer.think(thoughts)
    answer.push("Nine.")
    answer.close()
    final = screen(out.getvalue())
    assert final.startswith("step 0 of many")
    assert "step 8 of many" in final
    assert "/thinking" not in final


def screen(written: str, width: int = 60) -> str:
    """What a terminal shows after these bytes: cursor up, erase line and text are obeyed."""
    lines: list[str] = [""]
    row = column = at = 0
    while at < len(written):
        char = written[at]
        if char == "\x1b":
            end = next(i for i in range(at + 2, len(written)) if written[i].isalpha())
            count = written[at + 2 : end]
            if written[end] == "A":
                row -= int(count or 1)
            elif written[end] == "K":
                lines[row] = ""
            at = end + 1
            continue
        if char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif char == "\r":
            column = 0
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + char + line[column + 1 :]
            column += 1
        at += 1
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "xterm-256color"}, None),
        ({"TERM": "screen", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "x"}, None),
        ({}, None),
    ],
)
def test_terminals_are_known_by_their_environment(
    environment: dict[str, str], protocol: str | None
) -> None:
    assert preview_protocol(environment) == protocol


def test_previews_are_small_pictures() -> None:
    import base64

    shown = preview(picture(2000, 1000), "iterm")
    data = base64.b64decode(shown.partition(b":")[2].partition(b"\a")[0])
    assert Image.open(io.BytesIO(data)).size == (320, 160)
    pieces = preview(Image.effect_noise((400, 300), 90), "kitty").split(b"\x1b\\")[:-1]
    assert pieces[0].startswith(b"\x1b_Gf=100,a=T,m=1;")
    assert pieces[-1].startswith(b"\x1b_Gm=0;")
    assert all(len(piece) < 4200 for piece in pieces)


def test_sixels_draw_every_pixel_once() -> None:
    drawn = sixel(picture(20, 14)).decode()
    assert drawn.startswith('\x1bPq"1;1;20;14')
    body = drawn.partition("#0")[2]
    bits: Any = 0
    for band in body.removesuffix("\x1b\\").split("-"):
        for run in band.split("$"):
            codes = run.lstrip("#").lstrip("0123456789")
            if ";" in codes:
                codes = codes.rpartition(";")[2].lstrip("0123456789")
            bits += _bits(codes)
    assert bits == 20 * 14


def _bits(codes: str) -> int:
    total, at = 0, 0
    while at < len(codes):
        count = 1
        if codes[at] == "#":
            at += 1
            while at < len(codes) and codes[at].isdigit():
                at += 1
            continue
        if codes[at] == "!":
            end = at + 1
            while codes[end].isdigit():
                end += 1
            count, at = int(codes[at + 1 : end]), end
        if 63 <= ord(codes[at]) <= 126:
            total += count * (ord(codes[at]) - 63).bit_count()
        at += 1
    return total
