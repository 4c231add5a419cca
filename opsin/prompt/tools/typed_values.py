"""Argument values written as bare text, turned into JSON by the types that a schema allows."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from opsin.prompt.tools.tape import Put

# How many references in a row are followed.
_MAX_REFERENCES = 8
_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
STRING = frozenset({"string"})
NONE: frozenset[str] = frozenset()


def escaped(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def properties_of(schema: Any) -> Mapping[str, Any]:
    """The schemas of an object's listed properties."""
    found = schema.get("properties") if isinstance(schema, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def required_of(schema: Mapping[str, Any]) -> frozenset[str]:
    """The names of the properties that must be there."""
    found = schema.get("required")
    return frozenset(name for name in found if isinstance(name, str)) if _is_list(found) else NONE


def allowed_types(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a schema allows; none where it does not say.

    Every schema is looked at once, however often alternatives refer to it.
    """
    found: set[str] = set()
    seen: set[int] = set()
    waiting: list[tuple[Any, bool]] = [(schema, True)]
    while waiting:
        one, decides = waiting.pop()
        one = resolved(one, root)
        if id(one) in seen:
            continue
        seen.add(id(one))
        parts = _alternatives(one)
        stated = frozenset() if parts else _stated_types(one)
        if decides and not parts and not stated:
            return NONE
        found |= stated
        waiting += [(part, decides and "allOf" not in one) for part in parts]
    return frozenset(found)


def _alternatives(schema: Any) -> list[Any]:
    """The schemas that a schema without a type of its own is made of."""
    if not isinstance(schema, Mapping) or any(key in schema for key in ("type", "const", "enum")):
        return []
    lists = (schema.get(key) for key in ("anyOf", "oneOf", "allOf"))
    return [part for each in lists if _is_list(each) for part in each]


def _stated_types(schema: Any) -> frozenset[str]:
    if not isinstance(schema, Mapping):
        return NONE
    stated = schema.get("type")
    if isinstance(stated, str):
        return frozenset({stated})
    if _is_list(stated):
        return frozenset(name for name in stated if isinstance(name, str))
    if "const" in schema:
        return frozenset({json_type(schema["const"])})
    if _is_list(schema.get("enum")):
        return frozenset(json_type(value) for value in schema["enum"])
    return frozenset({"object"}) if properties_of(schema) else NONE


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """A schema, or what its `$ref` within the same schema stands for; {} for any other."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        schema = _pointed_at(root, schema["$ref"])
    return {}


def _pointed_at(root: Any, pointer: str) -> Any:
    if not pointer.startswith("#"):
        return {}
    for step in pointer.removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        root = root.get(name, {}) if isinstance(root, Mapping) else {}
    return root


def json_type(value: Any) -> str:
    """The name that JSON schemas give a value's type."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    kinds = ((float, "number"), (str, "string"), (list, "array"), (dict, "object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "null")


def loads(text: str) -> tuple[Any, bool]:
    """The value of a JSON text and whether it is one (strictly: no NaN, no infinity)."""
    try:
        return json.loads(text, parse_constant=_refuse), True
    except (ValueError, RecursionError):
        return None, False


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def as_json(text: str, types: frozenset[str]) -> str:
    """Bare text as JSON of one of these types, or of whatever it looks like where there are none.

    What has none of the types is a string.
    """
    if types == STRING:
        return json.dumps(text, ensure_ascii=False)
    trimmed = text.strip()
    for candidate in (trimmed, _WORDS.get(trimmed.lower(), "")):
        value, is_json = loads(candidate)
        if is_json and (not types or _fits(value, types)):
            return _whole(value, candidate, types)
    return json.dumps(text, ensure_ascii=False)


def _fits(value: Any, types: frozenset[str]) -> bool:
    kind = json_type(value)
    return kind in types or (kind == "integer" and "number" in types)


def _whole(value: Any, text: str, types: frozenset[str]) -> str:
    """A whole number that was written with a point, as the integer that is asked for."""
    if isinstance(value, float) and "number" not in types and "integer" in types:
        return str(int(value)) if math.isfinite(value) else text
    return text


class ArgumentsWriter:
    """Writes one JSON object, a key and a value at a time."""

    def __init__(self, put: Put, parameters: Mapping[str, Any]) -> None:
        self._put = put
        self._parameters = parameters
        self._is_empty = True

    def key(self, name: str) -> frozenset[str]:
        """Begin an argument; returns the types that its schema allows."""
        self._put(("{" if self._is_empty else ", ") + json.dumps(name, ensure_ascii=False) + ": ")
        self._is_empty = False
        return allowed_types(properties_of(self._parameters).get(name), self._parameters)

    def value(self, types: frozenset[str]) -> "TextValue":
        """Begin the value of the last key."""
        return TextValue(self._put, types)

    def close(self) -> None:
        """End the object."""
        self._put("{}" if self._is_empty else "}")


class TextValue:
    """Bare text on its way to a JSON value: strings go on as they come, others wait for their end.

    With `last_newline`, one at the very end is left out.
    """

    def __init__(self, put: Put, types: frozenset[str]) -> None:
        self._put = put
        self._types = types
        self._streams = types == STRING
        self._pieces: list[str] = []
        self._newline = ""
        if self._streams:
            put('"')

    def add(self, text: str) -> None:
        """More of the value; a newline at its end waits for what comes after it."""
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        self._pass_on(text.removesuffix("\n"))

    def close(self, keep_newline: bool = False) -> None:
        """End the value."""
        if keep_newline:
            self._pass_on(self._newline)
        if self._streams:
            self._put('"')
        else:
            self._put(as_json("".join(self._pieces), self._types))

    def _pass_on(self, text: str) -> None:
        if text and self._streams:
            self._put(escaped(text))
        elif text:
            self._pieces.append(text)
