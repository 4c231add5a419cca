import ast
from collections.abc import Callable

import pytest

from .tree import Source, called_name, core_sources, dotted, findings, source

Check = Callable[[Source], list[str]]
BROAD = {"Exception", "BaseException", "builtins.Exception", "builtins.BaseException"}


def probing(file: Source) -> list[str]:
    """Calls of getattr and hasattr: code that asks an object what it is."""
    return [
        f"{file.path}:{node.lineno} {called_name(node)}"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Call) and called_name(node) in {"getattr", "hasattr"}
    ]


def broad_excepts(file: Source) -> list[str]:
    """Handlers that catch everything: bare, Exception, or the same through suppress()."""
    found = []
    for node in ast.walk(file.tree):
        caught: list[ast.expr | None] = []
        if isinstance(node, ast.ExceptHandler):
            caught = list(node.type.elts) if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and called_name(node).split(".")[-1] == "suppress":
            caught = list(node.args)
        if any(kind is None or dotted(kind) in BROAD for kind in caught):
            found.append(f"{file.path}:{node.lineno}")
    return found


def global_statements(file: Source) -> list[str]:
    """Functions that rebind a module's names."""
    return [
        f"{file.path}:{node.lineno} global {', '.join(node.names)}"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Global)
    ]


@pytest.mark.parametrize("look", [probing, broad_excepts, global_statements])
def test_the_core_knows_its_objects_its_errors_and_its_state(look: Check) -> None:
    assert findings(look, core_sources()) == []


@pytest.mark.parametrize("text", ["hasattr(a, 'b')", "x = getattr(a, 'b', None)"])
def test_probing_is_found(text: str) -> None:
    assert probing(source("a.py", text))


@pytest.mark.parametrize(
    "handler", ["except:", "except Exception:", "except (ValueError, BaseException) as e:"]
)
def test_a_broad_except_is_found(handler: str) -> None:
    assert broad_excepts(source("a.py", f"try:\n    f()\n{handler}\n    pass"))
    assert broad_excepts(source("a.py", "with contextlib.suppress(Exception):\n    f()"))
    assert (
        broad_excepts(source("a.py", "try:\n    f()\nexcept (OSError, KeyError):\n    pass")) == []
    )


def test_a_global_statement_is_found() -> None:
    assert global_statements(source("a.py", "def f():\n    global x\n    x = 1"))
