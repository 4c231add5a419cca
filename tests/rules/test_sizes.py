import ast
from pathlib import Path

from .tree import ROOT, Source, findings, source, sources

FILE_LINES = 700
FUNCTION_LINES = 80
EVERYWHERE = ("opsin", "bench", "training", "tests")
NATIVE = ("c", "cc", "cpp", "cu", "h", "hpp")


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


def test_files_stay_small() -> None:
    native = [p for e in NATIVE for p in sorted((ROOT / "opsin").rglob(f"*.{e}"))]
    lengths = {s.path: len(s.lines) for s in sources(*EVERYWHERE)}
    lengths |= {str(p): len(p.read_text(encoding="utf-8").splitlines()) for p in native}
    assert {path: n for path, n in lengths.items() if n > FILE_LINES} == {}


def test_functions_stay_small() -> None:
    assert findings(long_functions, sources("opsin", "bench", "training")) == []


def test_a_long_function_is_found() -> None:
    body = "    x = 1\n" * FUNCTION_LINES
    assert long_functions(source("a.py", f"class A:\n  def f():\n{body}"))
    assert (
        long_functions(source("a.py", f"def f():\n{body.removesuffix('    x = 1' + chr(10))}"))
        == []
    )


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    paths = [s.path for s in sources(*EVERYWHERE)]
    assert [p for p in paths if drawers & set(Path(p).with_suffix("").parts)] == []


def test_only_a_commands_flags_are_not_counted() -> None:
    flags = ",\n".join(f"    flag{i}: int = 0" for i in range(FUNCTION_LINES))
    text = f"def command(\n{flags}\n):\n    pass\n"
    assert long_functions(source("opsin/cli/a.py", text)) == []
    assert long_functions(source("opsin/engine/a.py", text))
    body = "    x = 1\n" * (FUNCTION_LINES + 1)
    assert long_functions(source("opsin/cli/a.py", f"def command():\n{body}"))
