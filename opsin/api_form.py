"""What the Python API is asked of an answer's form, by keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from opsin.engine.asked import parse_tool, parse_tool_choice, response_form, schema_of
from opsin.engine.form import Wanted
from opsin.errors import InputError
from opsin.types import Constraint

FORM_FIELDS = ("response_format", "json_schema", "regex", "grammar", "choice")
_TEXTS: Mapping[str, Literal["regex", "grammar", "choice"]] = {
    "regex": "regex",
    "grammar": "grammar",
    "choice": "choice",
}
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")


def wanted(given: Mapping[str, Any]) -> Wanted:
    """The tools and the form that arguments ask for; InputError names the one that is wrong."""
    found = [made for name in FORM_FIELDS if (made := _constraint(name, given.get(name)))]
    if len(found) > 1:
        raise InputError(
            f"{found[0].param} and {found[1].param} cannot be used together",
            remedy="Give one of them",
            param=found[1].param,
        )
    listed = given.get("tools") or ()
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise InputError("tools is not a list", param="tools")
    tools = tuple(parse_tool(tool, f"tools[{i}]") for i, tool in enumerate(listed))
    choice = given.get("tool_choice")
    if choice is not None and not isinstance(choice, str | Mapping):
        raise InputError("tool_choice is not known", param="tool_choice")
    return Wanted(
        tools,
        parse_tool_choice(choice, tools),
        given.get("parallel_tool_calls") is not False,
        found[0] if found else None,
    )


def _constraint(name: str, value: Any) -> Constraint | None:
    if value is None:
        return None
    if name in _TEXTS:
        return Constraint(_TEXTS[name], value, name)
    describe = getattr(value, "model_json_schema", None)
    if isinstance(value, type) and callable(describe):  # a pydantic model's class
        return Constraint("json_schema", describe(), name)
    if name == "json_schema":
        return Constraint("json_schema", schema_of(value, name), name)
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is not an object", param=name)
    return response_form(value, name)
