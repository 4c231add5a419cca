import ast
import importlib
import inspect
import json
import re
import subprocess
import sys

import pytest

from .tree import ROOT, Source, source, sources

WRITTEN = ("opsin", "bench", "training")
HEAVY = ("torch", "transformers", "numpy", "gradio", "ray", "fastapi")


def opening(file: Source) -> str:
    """The first paragraph of the module docstring, on one line."""
    text = ast.get_docstring(file.tree) or ""
    return " ".join(text.partition("\n\n")[0].split())


def is_one_sentence(text: str) -> bool:
    """Whether the text ends like a sentence and holds no second one."""
    return text.endswith((".", ":")) and not re.search(r"[.!?] [A-Z]", text)


def test_a_module_opens_with_one_sentence() -> None:
    files = [s for s in sources(*WRITTEN) if s.text.strip()]
    assert [f"{s.path}: {opening(s)}" for s in files if not is_one_sentence(opening(s))] == []


@pytest.mark.parametrize("text", ["x = 1", '"""Two. Sentences."""', '"""No full stop"""'])
def test_another_opening_is_found(text: str) -> None:
    assert not is_one_sentence(opening(source("a.py", text)))


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert [s.path for s in sources(*WRITTEN) if later.search(s.text)] == []


def public_names() -> list[str]:
    """`opsin.__all__`, empty as long as the package has no front door."""
    if not (ROOT / "opsin" / "__init__.py").is_file():
        return []
    names = importlib.import_module("opsin").__dict__.get("__all__", [])
    return [name for name in names if not name.startswith("__")]


@pytest.mark.parametrize("name", public_names())
def test_public_names_exist_and_are_documented(name: str) -> None:
    value = getattr(importlib.import_module("opsin"), name)
    assert inspect.getdoc(value), f"opsin.{name} has no docstring"


def loaded_after(code: str) -> set[str]:
    """The heavy modules a fresh interpreter has loaded after running the code."""
    script = f"{code}\nimport json, sys\nprint('MODULES' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(HEAVY) & set(json.loads(done.stdout.rpartition("MODULES")[2]))


def test_importing_the_package_loads_no_torch() -> None:
    assert loaded_after("import opsin") == set()


@pytest.mark.skipif(not (ROOT / "opsin" / "__main__.py").is_file(), reason="no command line yet")
@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_loads_no_torch(argv: list[str]) -> None:
    code = (
        f"import runpy, sys\nsys.argv = ['opsin', *{argv!r}]\n"
        "try:\n    runpy.run_module('opsin', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code"
    )
    assert loaded_after(code) == set()
