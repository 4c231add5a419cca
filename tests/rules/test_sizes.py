import ast
from pathlib import Path

import pytest

from .tree import ROOT, Source, source, sources

FILE_LINES = 700
FUNCTION_LINES = 80
EVERYWHERE = ("opsin", "bench", "training", "tests")
NATIVE = sorted(
    p.relative_to(ROOT).as_posix()
    for ending in ("*.c", "*.h", "*.cpp", "*.hpp", "*.cc")
    for p in (ROOT / "opsin").rglob(ending)
)


def long_functions(file: Source) -> list[str]:
    """Functions over the limit, from `def` to the last line.

    A command's parameters are its table of flags, so under opsin/cli only the body counts.
    """
    found = []
    for node in ast.walk(file.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            start = node.body[0].lineno if file.path.startswith("opsin/cli/") else node.lineno
            length = (node.end_lineno or node.lineno) - start + 1
            if length > FUNCTION_LINES:
                found.append(f"{file.path}:{node.lineno} {node.name}: {length} lines")
    return found


@pytest.mark.parametrize("file", sources(*EVERYWHERE), ids=lambda s: s.path)
def test_files_stay_small(file: Source) -> None:
    assert len(file.lines) <= FILE_LINES


@pytest.mark.parametrize("file", sources("opsin", "bench", "training"), ids=lambda s: s.path)
def test_functions_stay_small(file: Source) -> None:
    assert long_functions(file) == []


@pytest.mark.parametrize("path", NATIVE)
def test_native_files_stay_small(path: str) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= FILE_LINES


def test_a_long_function_is_found() -> None:
    body = "    x = 1\n" * FUNCTION_LINES
    assert long_functions(source("a.py", f"class A:\n  def f():\n{body}"))
    assert (
        long_functions(source("a.py", f"def f():\n{body.removesuffix('    x = 1' + chr(10))}"))
        == []
    )


@pytest.mark.parametrize("file", sources(*EVERYWHERE), ids=lambda s: s.path)
def test_no_file_is_a_drawer_for_everything(file: Source) -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert drawers.isdisjoint(Path(file.path).with_suffix("").parts)


def test_only_a_commands_flags_are_not_counted() -> None:
    flags = ",\n".join(f"    flag{i}: int = 0" for i in range(FUNCTION_LINES))
    text = f"def command(\n{flags}\n):\n    pass\n"
    assert long_functions(source("opsin/cli/a.py", text)) == []
    assert long_functions(source("opsin/engine/a.py", text))
    body = "    x = 1\n" * (FUNCTION_LINES + 1)
    assert long_functions(source("opsin/cli/a.py", f"def command():\n{body}"))
