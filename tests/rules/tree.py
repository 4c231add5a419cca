"""Reads the source tree for the rule tests: files as syntax trees, layers, family names."""

from __future__ import annotations

import ast
import fnmatch
import functools
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The way imports go: a layer imports itself and the layers below it in this list, nothing else.
# docs/structure.md shows the same table; test_imports.py compares the two.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cli", ("opsin/cli/*", "opsin/__main__.py")),
    ("ui", ("opsin/ui/*",)),
    ("server", ("opsin/server/*",)),
    ("api", ("opsin/__init__.py", "opsin/api*.py", "opsin/api/*")),
    ("engine", ("opsin/engine/*",)),
    ("prompt", ("opsin/prompt/*",)),
    ("grounding", ("opsin/grounding/*",)),
    ("families", ("opsin/families/*",)),
    ("towers", ("opsin/towers/*",)),
    ("decoder", ("opsin/decoder/*",)),
    ("nn", ("opsin/nn/*",)),
    ("kernels", ("opsin/kernels/*",)),
    ("quant", ("opsin/quant/*",)),
    ("checkpoint", ("opsin/checkpoint/*",)),
    ("media", ("opsin/media/*",)),
    ("values", ("opsin/types.py", "opsin/errors.py", "opsin/config.py")),
)

# The folders that hold the arithmetic and the scheduling: the strictest rules apply to them.
CORE = ("decoder", "nn", "towers", "families", "engine")

# Files of opsin/families that are the seam and the index, and say nothing of a family themselves.
SEAM = frozenset({"__init__", "base", "index"})


@dataclass(frozen=True)
class Source:
    """One Python file: its path relative to the root (with "/"), its text and its syntax tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def stem(self) -> str:
        """The file's name without the ending."""
        return Path(self.path).stem

    @property
    def lines(self) -> list[str]:
        """The text, line by line."""
        return self.text.splitlines()


def source(path: str, text: str) -> Source:
    """A source from text, as the tests of the checks themselves need it."""
    return Source(path, text, ast.parse(text, path))


@functools.cache
def sources(*folders: str) -> tuple[Source, ...]:
    """Every Python file below the folders (default: the package), in a fixed order."""
    paths = sorted(p for f in folders or ("opsin",) for p in (ROOT / f).rglob("*.py"))
    return tuple(
        source(p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in paths
    )


def layer_of(path: str) -> str | None:
    """The layer a file belongs to, or None where the table has no place for it."""
    for name, patterns in LAYERS:
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns):
            return name
    return None


def rank(layer: str) -> int:
    """Position in the table, 0 at the top."""
    return [name for name, _ in LAYERS].index(layer)


def findings(look: Callable[[Source], list[str]], files: Iterable[Source]) -> list[str]:
    """What a check finds in all of the files."""
    return [finding for file in files for finding in look(file)]


def core_sources() -> list[Source]:
    """The files of the core folders."""
    return [s for s in sources() if layer_of(s.path) in CORE]


def family_sources() -> list[Source]:
    """The files that describe families: one each, and the shapes that several start from."""
    return [s for s in sources() if layer_of(s.path) == "families" and s.stem not in SEAM]


def imported_modules(file: Source) -> Iterator[tuple[int, str]]:
    """(line, dotted name) for every import, wherever it stands; relative ones are resolved.

    `from a import b` gives both `a` and `a.b`: only the reader of the name knows whether b is a
    module. `importlib.import_module("a.b")` and `__import__("a.b")` count when the name is written
    out.
    """
    package = file.path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in {
            "importlib.import_module",
            "import_module",
            "__import__",
        }:
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value


def dotted(node: ast.expr) -> str:
    """`a.b.c` for a name or a chain of attributes, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


def called_name(node: ast.Call) -> str:
    """The dotted name that is called."""
    return dotted(node.func)


def docstring_nodes(tree: ast.Module) -> set[int]:
    """The ids of the constants that are docstrings."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            found.add(id(first.value))
    return found


def words(text: str) -> list[str]:
    """Text as lower-case words, split where case, digits or punctuation change.

    `Qwen2VLConfig` gives qwen, 2, vl, config.
    """
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]


def mentions(text: str, names: frozenset[str]) -> set[str]:
    """The names (without punctuation, lower case) that stand in the text as whole words."""
    split = words(text)
    longest = max(map(len, names), default=0)
    found = set()
    for start in range(len(split)):
        run = ""
        for word in split[start:]:
            run += word
            if len(run) > longest:
                break
            if run in names:
                found.add(run)
    return found


def code_lines(file: Source) -> list[tuple[int, str]]:
    """(line number, text without white space) of every line that does something.

    Comments, docstrings, imports, blank lines and lines of lone punctuation are left out, so that
    two files cannot be told apart by what surrounds the same code.
    """
    skipped: set[int] = set()
    for node in ast.walk(file.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (
            isinstance(node, ast.Expr) and id(node.value) in docstring_nodes(file.tree)
        ):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    kept: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(file.text).readline):
        if token.type not in {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}:
            for offset, part in enumerate(token.string.splitlines()):
                line = token.start[0] + offset
                kept[line] = kept.get(line, "") + "".join(part.split())
    return [
        (line, text)
        for line, text in sorted(kept.items())
        if line not in skipped and re.search(r"\w", text)
    ]
