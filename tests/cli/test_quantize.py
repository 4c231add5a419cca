"""`opsin quantize` as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opsin.checkpoint.hub import BUNDLED


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opsin", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", ["quantize", "convert"])
def test_it_writes_a_folder_and_says_so(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(name, "--model", BUNDLED, "--out", str(out), "--recipe", "mixed_4_6")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.endswith(f"after: {out}")
    assert " MB before, " in last
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 4
    again = run(name, "--model", BUNDLED, "--out", str(out))
    assert again.returncode == 2
    assert again.stderr == (
        f"opsin: {out} is there already: the folder is not empty. Name a new folder.\n"
    )


def test_a_checkpoint_that_it_wrote_answers(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run("quantize", "--model", BUNDLED, "--out", out, "--bits", "8").returncode == 0
    asked = ("generate", "--prompt", "Hello", "--max-tokens", "8", "--model")
    answers = [run(*asked, name) for name in (BUNDLED, out)]
    assert [answer.returncode for answer in answers] == [0, 0], answers[1].stderr
    assert answers[1].stdout


def test_wrong_flags_are_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for flags, message in (
        (("--bits", "9"), "Cannot quantise to 9 bits"),
        (("--layout", "gguf"), "Unknown layout 'gguf'"),
    ):
        done = run("quantize", "--model", BUNDLED, "--out", out, *flags)
        assert done.returncode == 2
        assert message in done.stderr
