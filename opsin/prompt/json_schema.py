"""JSON schemas as the grammar takes them: what is no form left out, what is left open closed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from opsin.errors import InputError

# A document stands in one line, with at most a space behind commas and colons: nobody can tell how
# a model that was never shown the form would set it out. The separators are regular expressions.
JSON_SPACING = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# The formats that a grammar can hold a string to; by the standard any other is a remark.
FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)
# Keywords whose value is data, not a schema.
_DATA = frozenset({"const", "default", "enum", "example", "examples"})
# Keywords whose value has schemas by names of the user's own.
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "dependentSchemas")


def enforceable(schema: Any, param: str) -> dict[str, Any]:
    """A schema without formats that are only a remark, objects closed and set out in one line.

    Properties that an object's schema does not list are not written, unless the schema says that
    there may be more: without this, a model may go on inventing them. Raises InputError.
    """
    if not isinstance(schema, Mapping):
        raise InputError(f"{param} is not a JSON schema", param=param)
    try:
        closes = not any(_combines(part) for part in _objects(schema))
        kept: dict[str, Any] = _rewritten(schema, closes)
        json.dumps(kept, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise InputError(
            f"{param} is not a JSON schema",
            why=f"it cannot be written as JSON: {error}",
            param=param,
        ) from None
    own = kept.get("x-guidance")
    settings = own if isinstance(own, dict) else {}
    spaced = "whitespace_pattern" in settings or not JSON_SPACING.keys().isdisjoint(settings)
    return {**kept, "x-guidance": settings if spaced else {**JSON_SPACING, **settings}}


def _objects(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and every schema in it."""
    if isinstance(schema, list | tuple):
        for item in schema:
            yield from _objects(item)
    elif isinstance(schema, Mapping):
        yield schema
        for key, value in schema.items():
            if key in _NAMED and isinstance(value, Mapping):
                yield from _objects(list(value.values()))
            elif key not in _DATA:
                yield from _objects(value)


def _combines(schema: Mapping[str, Any]) -> bool:
    """Whether an object may have to fit several schemas, none of which can be closed alone."""
    every = schema.get("allOf")
    several = isinstance(every, list | tuple) and len(every) > 1
    return several or ("properties" in schema and any(key in schema for key in _COMBINING))


def _rewritten(schema: Any, closes: bool) -> Any:
    if isinstance(schema, list | tuple):
        return [_rewritten(item, closes) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _DATA:
            made[key] = value
        elif key in _NAMED and isinstance(value, Mapping):
            made[key] = {name: _rewritten(held, closes) for name, held in value.items()}
        elif key != "format" or value in FORMATS:
            made[key] = _rewritten(value, closes)
    properties = made.get("properties")
    if closes and isinstance(properties, dict) and made.get("type", "object") == "object":
        made.setdefault("additionalProperties", False)
    return made
