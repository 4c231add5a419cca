"""Reads what people ask of an answer's form: tools and their choice, schemas, response formats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opsin.errors import InputError
from opsin.prompt.tools.dialect import Tool
from opsin.types import Constraint


def parse_tool(tool: Any, where: str) -> Tool:
    """A tool as chat completions and Responses write it."""
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise InputError(
            f"{where} is not a function", remedy="Only function tools exist here", param=where
        )
    held = tool.get("function", tool)
    name = held.get("name") if isinstance(held, Mapping) else None
    if not isinstance(name, str) or not 0 < len(name) <= 128:
        raise InputError(f"{where} has no name", param=f"{where}.function.name")
    parameters = held.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise InputError(
            f"{where}.function.parameters is not a JSON schema",
            param=f"{where}.function.parameters",
        )
    return Tool(name, str(held.get("description") or ""), parameters, bool(held.get("strict")))


def parse_tool_choice(choice: Any, tools: Sequence[Tool]) -> str:
    """auto, none, required, or "=" and a tool's name."""
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise InputError(
                "tool_choice is not known",
                remedy="Use auto, none, required or a function",
                param="tool_choice",
            )
        if choice == "required" and not tools:
            raise InputError("tool_choice needs tools", param="tool_choice")
        return choice
    held = choice.get("function", choice)
    name = held.get("name") if isinstance(held, Mapping) else None
    if name not in {tool.name for tool in tools}:
        raise InputError("tool_choice names no tool of the request", param="tool_choice")
    return f"={name}"


def schema_of(value: Any, param: str) -> dict[str, Any]:
    """A JSON schema that is given as an object or as the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, Mapping):
        raise InputError(f"{param} is not a JSON schema", param=param)
    return dict(value)


def response_form(value: Mapping[str, Any], where: str) -> Constraint | None:
    """The form that OpenAI's `response_format` (or Responses' `text.format`) names."""
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint("json_object", None, where)
    if kind != "json_schema":
        raise InputError(
            f"{where}.type is not known",
            remedy="Use text, json_object or json_schema",
            param=f"{where}.type",
        )
    # Responses puts the schema beside the type, chat one level deeper.
    held = value.get("json_schema", value)
    schema = held.get("schema") if isinstance(held, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InputError(f"{where} has no schema", param=f"{where}.json_schema.schema")
    return Constraint("json_schema", dict(schema), where)
