"""Runs what README and docs show: fences below `<!-- run -->`, and what they are said to print."""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import opsin
from opsin.__main__ import main
from opsin.cli import made
from opsin.server.settings import read_file, read_settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(<!-- run -->\n)?```(\w*)\n(.*?)^```$\n?(\n```text\n(.*?)^```$)?", re.M | re.S)
LINK = re.compile(r"\]\((?!https?://)([^)#\s]+)(#[^)\s]*)?\)")


@dataclass(frozen=True)
class Snippet:
    """A fence that is to be run, with the output that stands under a Python one."""

    language: str
    text: str
    printed: str


def snippets(page: Path) -> list[Snippet]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Snippet(each[2], each[3], each[5] or "") for each in found if each[1]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which docs/images is there, and anything may be written."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "images").symlink_to(ROOT / "docs" / "images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(ROOT))
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if snippets(page)], ids=lambda page: page.stem
)
def test_what_a_page_shows_is_what_happens(page: Path, place: Path) -> None:
    script = ""
    expected = ""
    for snippet in snippets(page):
        if snippet.language == "python":
            script += snippet.text
            expected += snippet.printed
            continue
        for command, printed in commands(snippet):
            check(printed, run(command), command)
    if script:
        (place / "script.py").write_text(script, encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_path(str(place / "script.py"), run_name="snippet")
        check(expected, out.getvalue(), script)


def commands(snippet: Snippet) -> Iterator[tuple[str, str]]:
    """Each command with the output that stands below it; a price is no command.

    Of a block of shell lines those of opsin are run, whatever they print.
    """
    if snippet.language == "sh":
        yield from ((line, "...") for line in snippet.text.splitlines() if "opsin " in line)
        return
    assert snippet.language == "console", snippet
    parts = re.split(r"^\$ ", snippet.text, flags=re.M)
    assert parts[0] == "", snippet
    for part in parts[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed


def run(command: str) -> str:
    """What a command prints: `opsin` in this process, a pipe in a shell."""
    if "|" in command:
        here = f"{shlex.quote(sys.executable)} -m opsin"
        done = subprocess.run(
            ["sh", "-c", command.replace("opsin chat", f"{here} chat")],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
    words = shlex.split(command)
    assert words[0] == "opsin", command
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        before, sys.argv = sys.argv, words
        try:
            main()
        except SystemExit as ended:
            # An error is shown as the one line that a person sees.
            shown = [line for line in err.getvalue().splitlines() if "bundled model" not in line]
            return out.getvalue() if not ended.code else "\n".join(shown) + "\n"
        finally:
            sys.argv = before
    return out.getvalue()


def check(expected: str, printed: str, what: str) -> None:
    """Compare, `...` standing for anything."""
    pattern = "*".join(re.sub(r"([\[\]*?])", r"[\1]", part) for part in expected.split("..."))
    assert fnmatch.fnmatchcase(printed, pattern), f"{what}\nprinted:\n{printed}\nnot:\n{expected}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [name for name, _ in LINK.findall(text) if not (page.parent / name).exists()]
    assert missing == []


def test_a_marked_fence_is_found() -> None:
    assert len(snippets(ROOT / "docs" / "quickstart.md")) >= 2
    with pytest.raises(AssertionError):
        check("a...c", "abd", "")
    check("a[...c", "a[bc", "")


def shown_only(page: Path) -> list[tuple[str, str]]:
    """The language and text of fences that name models or services which no test has."""
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [(each[2], each[3]) for each in found if not each[1]]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if shown_only(page)], ids=lambda page: page.stem
)
def test_what_cannot_be_run_is_written_as_it_would_run(page: Path, tmp_path: Path) -> None:
    """Commands have these flags, names are there, settings are known."""
    for language, text in shown_only(page):
        if language in ("console", "sh"):
            lines = [line.removeprefix("$ ") for line in text.splitlines()]
            for line in lines:
                if line.startswith("opsin "):
                    check_words(shlex.split(line, comments=True)[1:])
        elif language == "python":
            check_names(ast.parse(text))
        elif language == "yaml":
            (tmp_path / "opsin.yaml").write_text(text, encoding="utf-8")
            read_settings({}, {}, read_file(tmp_path / "opsin.yaml"))


def check_words(words: list[str]) -> None:
    """That a command takes these words; nothing is done."""
    command = made(words[0])
    with command.make_context(words[0], words[1:]):
        pass


def check_names(tree: ast.Module) -> None:
    """That what is imported from opsin and what it is asked for exists."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opsin"):
            module = importlib.import_module(str(node.module))
            assert [each.name for each in node.names if not hasattr(module, each.name)] == []
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "opsin":
            assert node.attr in opsin.__all__ or importlib.util.find_spec(f"opsin.{node.attr}")


def test_a_wrong_command_or_name_is_found() -> None:
    with pytest.raises(Exception, match="--no-such-flag"):
        check_words(["generate", "--no-such-flag", "What?"])
    with pytest.raises(AssertionError):
        check_names(ast.parse("from opsin import nothing"))
