import ast
from collections import defaultdict

import pytest

from opsin.families import index

from .tree import (
    ROOT,
    Source,
    code_lines,
    docstring_nodes,
    family_sources,
    findings,
    layer_of,
    mentions,
    source,
    sources,
    words,
)

WINDOW = 8


def family_names() -> frozenset[str]:
    """Every `model_type` of the index, without punctuation.

    Names that are also a tower's file (an architecture, such as a speech encoder) or a tool
    dialect's file stand for those and are free to be used.
    """
    shared = {p.stem for f in ("towers", "prompt/tools") for p in (ROOT / "opsin" / f).glob("*.py")}
    named = {*index.MODULES, *index.ALIASES, *(name for pair in index.BY_TOWER for name in pair)}
    return frozenset("".join(words(name)) for name in named - shared)


def named_families(file: Source, names: frozenset[str]) -> list[str]:
    """Where code (not comments, not docstrings) of a file speaks of a family."""
    docstrings = docstring_nodes(file.tree)
    found = []
    for node in ast.walk(file.tree):
        if id(node) in docstrings:
            continue
        said = [v for _, v in ast.iter_fields(node) if isinstance(v, str)]
        for text in said:
            line = getattr(node, "lineno", 0)
            found += [f"{file.path}:{line} {name} in {text!r}" for name in mentions(text, names)]
    return found


def test_no_family_is_named_outside_families() -> None:
    names = family_names()
    outside = [s for s in sources() if layer_of(s.path) != "families"]
    assert findings(lambda file: named_families(file, names), outside) == []


@pytest.mark.parametrize(
    "text",
    [
        "if config['model_type'] == 'alpha2_vl': pass",
        "is_alpha2_vl = True",
        "class Alpha2VLConfig: pass",
        "def f(): return 'org/Alpha2-VL-2B-Instruct'",
        "x.alpha2_vl",
        "import opsin.families.alpha2_vl",
    ],
)
def test_a_family_name_in_code_is_found(text: str) -> None:
    assert named_families(source("opsin/engine/x.py", text), frozenset({"alpha2vl"}))


@pytest.mark.parametrize("text", ["# alpha2_vl\n", '"""About alpha2_vl."""\n', "alpha2 = vl3 = 1"])
def test_comments_docstrings_and_other_words_may_stand(text: str) -> None:
    assert named_families(source("opsin/engine/x.py", text), frozenset({"alpha2vl"})) == []


def shared_windows(files: list[Source]) -> list[str]:
    """Windows of eight lines of code that stand in two of the files."""
    places: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for file in files:
        lines = code_lines(file)
        for start in range(len(lines) - WINDOW + 1):
            window = tuple(text for _, text in lines[start : start + WINDOW])
            places[window].setdefault(file.path, lines[start][0])
    return [
        " and ".join(f"{path}:{line}" for path, line in where.items())
        for where in places.values()
        if len(where) > 1
    ]


def test_no_two_families_share_eight_lines() -> None:
    assert shared_windows(family_sources()) == []


def test_eight_shared_lines_are_found_whatever_stands_around_them() -> None:
    block = "\n".join(f"a{i} = f({i})" for i in range(WINDOW))
    spaced = '"""Other."""\nimport b\n' + block.replace(" = ", "   =  ").replace(
        "\n", "  # why\n\n"
    )
    one = source("opsin/families/one.py", f'"""One."""\nimport a\nfirst = 1\n{block}\n')
    two = source("opsin/families/two.py", spaced)
    assert len(shared_windows([one, two])) == 1
    assert shared_windows([one, source("two.py", spaced.replace("a3", "c3"))]) == []


def test_a_family_file_has_at_most_250_lines() -> None:
    assert [s.path for s in family_sources() if len(s.lines) > 250] == []


def test_the_index_names_files_that_exist() -> None:
    assert {*index.MODULES.values(), *index.BY_TOWER.values()} <= {s.stem for s in family_sources()}
    assert set(index.ALIASES.values()) <= set(index.MODULES)
    assert family_names()
