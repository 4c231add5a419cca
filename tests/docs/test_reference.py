"""The references are what the code says."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import opsin
from opsin.cli import COMMANDS, made

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"


@pytest.fixture(scope="module")
def writer() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "write.py"))


@pytest.mark.parametrize("page", ["cli.md", "api.md"])
def test_a_page_is_what_the_code_says(page: str, writer: dict[str, Any]) -> None:
    written = (FOLDER / page).read_text(encoding="utf-8")
    assert written == writer["PAGES"][page](), "run: make reference"


def test_every_command_and_every_public_name_is_there() -> None:
    commands = (FOLDER / "cli.md").read_text(encoding="utf-8")
    names = (FOLDER / "api.md").read_text(encoding="utf-8")
    shown = [name for name, listed in COMMANDS.items() if not listed.hidden]
    assert [name for name in shown if f"## opsin {name}\n" not in commands] == []
    assert [name for name in opsin.__all__ if f"### {name}\n" not in names] == []
    assert "| `--max-tokens INTEGER` | `256` |" in commands
    assert "def load(\n" in names


def test_the_list_says_what_a_command_s_own_help_says() -> None:
    assert {name: made(name).help for name in COMMANDS} == {
        name: listed.about for name, listed in COMMANDS.items()
    }


@pytest.mark.parametrize(
    ("words", "loaded"),
    [(["--version"], []), (["--help"], []), (["generate", "--help"], ["flags", "generate"])],
)
def test_a_command_is_imported_when_it_is_asked_for(words: list[str], loaded: list[str]) -> None:
    code = (
        f"import runpy, sys\nsys.argv = ['opsin', *{words!r}]\n"
        "try:\n    runpy.run_module('opsin', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print('LOADED', *sorted(n[10:] for n in sys.modules if n.startswith('opsin.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1].split()[1:] == loaded, done.stderr
