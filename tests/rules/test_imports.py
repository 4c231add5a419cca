import re

import pytest

from .tree import LAYERS, ROOT, Source, findings, imported_modules, layer_of, rank, source, sources


def known_module(dotted_name: str) -> str | None:
    """The file that a dotted name of the package stands for, or None."""
    stem = dotted_name.replace(".", "/")
    for path in (f"{stem}.py", f"{stem}/__init__.py"):
        if (ROOT / path).is_file():
            return path
    return f"{stem}/__init__.py" if (ROOT / stem).is_dir() else None


def upward_imports(file: Source) -> list[str]:
    """The imports of a file that go up in the table."""
    mine = layer_of(file.path)
    assert mine is not None, file.path
    found = []
    imports = [(line, name) for line, name in imported_modules(file) if name.startswith("opsin")]
    for line, name in imports:
        below = any(other.startswith(name + ".") for at, other in imports if at == line)
        if name == "opsin" and below:
            continue  # `from opsin import errors` is an import of errors, judged on its own
        path = known_module(name) or known_module(name.rpartition(".")[0])
        target = layer_of(path) if path else layer_of(name.replace(".", "/") + "/x.py")
        if target is not None and rank(target) < rank(mine):
            found.append(f"{file.path}:{line} imports {name}: {mine} stands below {target}")
    return found


def test_every_file_has_a_place_in_the_table() -> None:
    assert [s.path for s in sources() if layer_of(s.path) is None] == []


def test_imports_go_downwards() -> None:
    assert findings(upward_imports, sources()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("opsin/nn/linear.py", "from opsin.engine import loop"),
        ("opsin/nn/linear.py", "def f():\n    import opsin.engine.loop"),
        ("opsin/types.py", "from . import media"),
        ("opsin/media/image.py", "from ..checkpoint.hub import resolve"),
        ("opsin/decoder/decoder.py", "import importlib\nimportlib.import_module('opsin.towers')"),
        ("opsin/engine/loop.py", "import opsin"),
        ("opsin/checkpoint/hub.py", "from opsin import load"),
        (
            "opsin/errors.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import nn",
        ),
    ],
)
def test_an_import_that_goes_up_is_found(path: str, text: str) -> None:
    assert upward_imports(source(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("opsin/nn/linear.py", "from opsin.errors import CheckpointError"),
        ("opsin/nn/linear.py", "from opsin import errors"),
        ("opsin/nn/linear.py", "from ..errors import OpsinError\nfrom . import norm"),
        ("opsin/engine/loop.py", "from opsin.families import base"),
        ("opsin/cli/app.py", "import opsin"),
    ],
)
def test_an_import_that_goes_down_is_let_through(path: str, text: str) -> None:
    assert upward_imports(source(path, text)) == []


def test_the_public_page_shows_the_same_table() -> None:
    page = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| `([a-z]+)` \|", page, re.MULTILINE)
    assert rows == [name for name, _ in LAYERS]
