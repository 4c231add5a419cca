"""Writes the two pages beside it: commands with their flags, names with their docstrings.

Run it as `make reference` after changing a flag, a signature or a docstring.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, get_type_hints

HERE = Path(__file__).parent
KINDS = {"int": "INTEGER", "float": "NUMBER", "Path": "PATH"}
NOTE = "<!-- Written by docs/reference/write.py from the code: `make reference`. -->\n"
# Whose public names are described: all of a module, or the ones named.
MODULES: dict[str, tuple[str, ...]] = {
    "opsin": (),
    "opsin.grounding": (),
    "opsin.types": (),
    "opsin.media.limits": ("MediaLimits",),
    "opsin.engine.limits": ("EngineLimits",),
    "opsin.errors": (),
}


def command_page() -> str:
    """All commands, as Markdown."""
    from opsin.cli import COMMANDS, made

    head = "# The command line\n\n`opsin COMMAND -h` prints the same.\n"
    shown = {listed.module: name for name, listed in COMMANDS.items() if not listed.hidden}
    hidden = {name: shown[listed.module] for name, listed in COMMANDS.items() if listed.hidden}
    parts = [
        section
        for name, listed in COMMANDS.items()
        if not listed.hidden
        for section in command_sections(f"opsin {name}", made(name))
    ]
    also = (f"`opsin {name}` is another name of `opsin {own}`." for name, own in hidden.items())
    aliases = f"\n{' '.join(also)}\n"
    return "\n".join([NOTE, head + aliases, *parts])


def command_sections(path: str, command: Any) -> list[str]:
    """A command and those below it."""
    kinds = get_type_hints(inspect.unwrap(command.callback)) if command.callback else {}
    places = []
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            places.append(place := parameter.metavar or parameter.name.upper())
            rows = panels.setdefault("Arguments", [])
            rows.append(row([place], parameter))
        elif not parameter.hidden:
            rows = panels.setdefault(parameter.rich_help_panel or "Options", [])
            rows.append(option_row(parameter, kinds[parameter.name]))
    below = getattr(command, "commands", {})
    usage = " ".join([path, "[FLAGS]", *places, *(["COMMAND"] if below else [])])
    about = inspect.cleandoc(command.help or "").split("\f")[0]
    lines = [f"## {path}", "", about, "", f"```text\n{usage}\n```", ""]
    for title, rows in panels.items():
        first = "argument" if title == "Arguments" else "flag"
        lines += [f"**{title}**", "", f"| {first} | default | |", "|---|---|---|", *rows, ""]
    return [
        "\n".join(lines),
        *(part for name in below for part in command_sections(f"{path} {name}", below[name])),
    ]


def option_row(option: Any, kind: Any) -> str:
    """A flag with all its spellings as a row of a table."""
    written = next((word for kinds, word in KINDS.items() if kinds in str(kind)), "TEXT")
    value = "" if option.is_flag else f" {option.metavar or written}"
    names = [*option.opts, *option.secondary_opts]
    return row([names[0] + value, *names[1:]], option)


def row(names: list[str], parameter: Any) -> str:
    """Names in code, the default, and what it does."""
    default = parameter.default
    is_empty = default is None or default is False or default in ("", (), [])
    shown = "" if is_empty else f"`{default}`"
    if parameter.required:
        shown = "required"
    code = ", ".join(f"`{name}`" for name in names)
    cells = (code, shown, " ".join((parameter.help or "").split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def python_page() -> str:
    """All public names, as Markdown."""
    parts = [
        NOTE,
        "# The Python API\n",
        "What does not stand under `opsin` is imported from its own module.\n",
    ]
    seen: set[int] = set()
    for home, names in MODULES.items():
        module = importlib.import_module(home)
        about = "" if names else prose(inspect.getdoc(module) or "") + "\n"
        parts.append(f"## {home}\n\n{about}")
        for name in names or public_names(module):
            value = getattr(module, name)
            if id(value) not in seen:
                seen.add(id(value))
                parts.append(described(name, value))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))


def public_names(module: Any) -> list[str]:
    """`__all__`, or the classes that the module defines."""
    own = [
        name for name, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__
    ]
    return [n for n in getattr(module, "__all__", own) if not n.startswith("_")]


def described(name: str, value: Any) -> str:
    """A function or a class: its signature, its docstring, its public members."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
    assert isinstance(tree, ast.FunctionDef | ast.ClassDef), name
    title = f"### {name}\n\n"
    if isinstance(tree, ast.FunctionDef):
        return title + shown(signature(tree), tree)
    bases = f"({', '.join(map(ast.unparse, tree.bases))})" if tree.bases else ""
    fields = [ast.unparse(n) for n in tree.body if isinstance(n, ast.AnnAssign | ast.Assign)]
    own = "".join(f"\n    {tidy(field)}" for field in fields if not field.startswith("_"))
    parts = [shown(f"class {name}{bases}:{own or ' ...'}", tree)]
    parts += [
        shown(signature(n), n)
        for n in tree.body
        if isinstance(n, ast.FunctionDef) and is_for_callers(n)
    ]
    return title + "\n".join(parts)


def is_for_callers(node: ast.FunctionDef) -> bool:
    """Whether a method is named without an underscore, or makes the object."""
    return not node.name.startswith("_") or node.name == "__init__"


def signature(node: ast.FunctionDef) -> str:
    """The definition's head; one parameter a line where it would be longer than a page is wide."""
    marks = "".join(f"@{ast.unparse(mark)}\n" for mark in node.decorator_list)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = split_arguments(tidy(ast.unparse(node.args)))
    line = f"def {node.name}({', '.join(arguments)}){returns}: ..."
    if len(line) > 100:
        pieces = "".join(f"    {argument},\n" for argument in arguments)
        line = f"def {node.name}(\n{pieces}){returns}: ..."
    return marks + line


def split_arguments(text: str) -> list[str]:
    """At the commas that stand in no brackets; spaces around the `=` after a type."""
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    return [p.strip().replace("=", " = ", 1) if ":" in p else p.strip() for p in pieces]


def tidy(text: str) -> str:
    """With the quotes and spaces that this code is written with."""
    text = text.replace(" ** ", "**")
    return text if '"' in text else text.replace("'", '"')


def shown(code: str, node: ast.FunctionDef | ast.ClassDef) -> str:
    """A fence of Python, and the docstring under it."""
    return f"```python\n{code}\n```\n\n{prose(ast.get_docstring(node) or '')}\n"


def prose(text: str) -> str:
    """A docstring as Markdown: drawings in a fence, lists of names as lists, tags as written."""
    return "\n\n".join(paragraph(each) for each in text.split("\n\n"))


def paragraph(text: str) -> str:
    """One paragraph of a docstring as Markdown."""
    if "\u2500" in text:
        return f"```text\n{text}\n```"
    if re.search(r"^    \S", text, re.M):
        text = re.sub(r"^(?=\w)", "- ", re.sub(r"^    (?=\S)", "  ", text, flags=re.M), flags=re.M)
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else p.replace("<", "\\<") for p in pieces)


PAGES = {"cli.md": command_page, "api.md": python_page}

if __name__ == "__main__":
    for file, page in PAGES.items():
        (HERE / file).write_text(page(), encoding="utf-8")
