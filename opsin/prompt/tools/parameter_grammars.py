"""Grammar rules of arguments that are written one by one, each between tags of its own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsin.prompt.tools.grammars import ANY_TEXT, HasSchema, Marks, join, json_term, schema_of
from opsin.prompt.tools.typed_values import (
    allowed_types,
    properties_of,
    required_of,
    resolved,
)

_SHARED = ("$defs", "definitions")


@dataclass(frozen=True, slots=True)
class ArgumentTags:
    """The texts and markers around a key and around its value, and what follows the value."""

    key_start: tuple[str, ...]
    value_start: tuple[str, ...]
    value_end: tuple[str, ...]
    after: str = ""


def argument_rules(tool: HasSchema, prefix: str, tags: ArgumentTags, marks: Marks) -> list[str]:
    """Rules in which `prefix` is all arguments of a tool, in the order of its schema.

    Text is held to its enum alone: what else a schema says of strings is let through.
    """
    schema = schema_of(tool)
    wanted = required_of(schema)
    parts: list[str] = []
    rules: list[str] = []
    for index, (name, each) in enumerate(properties_of(schema).items()):
        rule = f"{prefix}_{index}"
        parts.append(rule if name in wanted else f"{rule}?")
        opening = join(*(marks.term(text) for text in (*tags.key_start, name, *tags.value_start)))
        rules.append(f"{rule}: {join(opening, f'{rule}_value', marks.term(tags.after))}")
        rules.append(_value_rule(f"{rule}_value", each, schema, tool.strict, tags, marks))
    return [f"{prefix}: {join(*parts)}" if parts else f'{prefix}: ""', *rules]


def _value_rule(
    rule: str,
    schema: Any,
    root: Mapping[str, Any],
    strict: bool,
    tags: ArgumentTags,
    marks: Marks,
) -> str:
    """The rule of a value and the tags that end it."""
    end = join(*(marks.term(text) for text in tags.value_end))
    types = allowed_types(schema, root)
    if types and "string" not in types:
        shared = {key: root[key] for key in _SHARED if key in root}
        held = {**shared, **schema} if isinstance(schema, Mapping) else schema
        return f"{rule}: {json_term(held, strict)} {end}"
    texts = _choices(resolved(schema, root))
    if texts:
        return f"{rule}: ({' | '.join(marks.term(text) for text in texts)}) {end}"
    if any(marks.is_special(text) for text in tags.value_end):
        return f"{rule}: {ANY_TEXT} {marks.term(tags.value_end[-1])}"
    return f"{rule}[suffix={json.dumps(''.join(tags.value_end))}]: {ANY_TEXT}"


def _choices(schema: Any) -> list[str]:
    """The texts that an enumeration allows."""
    if not isinstance(schema, Mapping):
        return []
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if not isinstance(values, list):
        return []
    return [text if isinstance(text, str) else json.dumps(text) for text in values]
