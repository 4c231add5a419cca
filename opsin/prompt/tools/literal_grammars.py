"""Grammar rules of values in notations other than JSON, from a JSON schema."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from opsin.prompt.tools.grammars import HasSchema, join, literal, schema_of
from opsin.prompt.tools.typed_values import allowed_types, properties_of, required_of, resolved

_MAX_DEPTH = 16
_INTEGER = "/-?(0|[1-9][0-9]{0,15})/"
_NUMBER = r"/-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,3})?/"
_ANY = ("string", "number", "boolean", "null", "array", "object")


@dataclass(frozen=True)
class Style:
    """How a notation writes values.

    `string` and `any_key` are the terms of any string and of any key with its colon; `quote` gives
    the term of one string, `key` and `argument` the text of one key. `rules` are what they need.
    """

    string: str
    any_key: str
    quote: Callable[[str], str]
    key: Callable[[str], str]
    argument: Callable[[str], str]
    words: Mapping[Any, str]
    comma: str
    rules: tuple[str, ...] = ()


PYTHON = Style(
    string=r'/"([^"\\\x00-\x1f]|\\["\\bfnrt]|\\u[0-9a-fA-F]{4})*"/',
    any_key=r'/"([^"\\\x00-\x1f]|\\["\\bfnrt])*": /',
    quote=lambda text: literal(json.dumps(text, ensure_ascii=False)),
    key=lambda name: f"{json.dumps(name, ensure_ascii=False)}: ",
    argument=lambda name: f"{name}=",
    words={True: "True", False: "False", None: "None"},
    comma=", ",
)


class LiteralRules:
    """The rules of one tool's arguments; names begin with `prefix`.

    Types, enumerations, required and listed properties are held to; limits of length, size or form
    are not.
    """

    def __init__(self, style: Style, prefix: str, tool: HasSchema) -> None:
        self._style = style
        self._prefix = prefix
        self._root = schema_of(tool)
        self._by_reference: dict[str, str] = {}
        self._has_any = False
        self.rules: list[str] = []

    def arguments(self) -> str:
        """The rule of all arguments, each with its name, separated as the notation does."""
        return self._members(self._root, self._style.argument, 0)

    def _add(self, body: str) -> str:
        name = f"{self._prefix}_{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _reserve(self) -> str:
        """A rule's name, before its body is known."""
        self.rules.append("")
        return f"{self._prefix}_{len(self.rules) - 1}"

    def _fill(self, name: str, body: str) -> str:
        self.rules[int(name.rpartition("_")[2])] = f"{name}: {body}"
        return name

    def _value(self, schema: Any, depth: int) -> str:
        """The rule of a value."""
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if isinstance(reference, str):
            if reference in self._by_reference:
                return self._by_reference[reference]
            self._by_reference[reference] = name = self._reserve()
            return self._fill(name, self._body(resolved(schema, self._root), depth))
        name = self._reserve()
        return self._fill(name, self._body(schema, depth))

    def _body(self, schema: Any, depth: int) -> str:
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return self._any()
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(choices, list) and choices:
            return " | ".join(self._written(value) for value in choices)
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return " | ".join(self._value(each, depth + 1) for each in schema[key])
        types = allowed_types(schema, self._root) or frozenset(_ANY)
        if types == frozenset(_ANY):
            return self._any()
        return " | ".join(self._typed(kind, schema, depth) for kind in sorted(types))

    def _typed(self, kind: str, schema: Mapping[str, Any], depth: int) -> str:
        style = self._style
        words = style.words
        if kind == "array":
            item = self._value(schema["items"], depth + 1) if "items" in schema else self._any()
            return self._listed(item)
        if kind == "object":
            if not properties_of(schema):
                return self._mapping(schema.get("additionalProperties"), depth)
            return f"{literal('{')} {self._members(schema, style.key, depth + 1)} {literal('}')}"
        simple = {
            "string": style.string,
            "integer": _INTEGER,
            "number": _NUMBER,
            "boolean": f"{literal(words[True])} | {literal(words[False])}",
            "null": literal(words[None]),
        }
        return simple.get(kind, self._any())

    def _listed(self, item: str) -> str:
        comma = literal(self._style.comma)
        return f"{literal('[')} ({item} ({comma} {item})*)? {literal(']')}"

    def _mapping(self, values: Any, depth: int) -> str:
        value = self._value(values, depth + 1) if isinstance(values, Mapping) else self._any()
        member = f"{self._style.any_key} {value}"
        comma = literal(self._style.comma)
        return f"{literal('{')} ({member} ({comma} {member})*)? {literal('}')}"

    def _members(self, schema: Mapping[str, Any], key: Callable[[str], str], depth: int) -> str:
        """The rule of an object's listed properties, in order, the optional ones left out or not.

        `rest` is what may follow when one has been written already, `first` what may come first.
        """
        members = list(properties_of(schema).items())
        wanted = required_of(schema)
        comma = literal(self._style.comma)
        rest = self._add('""')
        firsts: list[str] = []
        is_optional = True
        for name, each in reversed(members):
            member = f"{literal(key(name))} {self._value(each, depth + 1)}"
            if name in wanted:
                firsts = []
                is_optional = False
            firsts.append(self._add(f"{member} {rest}"))
            optional = "" if name in wanted else "?"
            rest = self._add(f"({comma} {member}){optional} {rest}")
        alternatives = [*reversed(firsts), *(['""'] if is_optional else [])]
        return self._add(" | ".join(alternatives))

    def _any(self) -> str:
        """The rule of any value at all."""
        name = f"{self._prefix}_any"
        if not self._has_any:
            self._has_any = True
            at = len(self.rules)
            self.rules.append("")
            style = self._style
            words = " | ".join(literal(word) for word in style.words.values())
            body = f"{style.string} | {_NUMBER} | {words}"
            self.rules[at] = f"{name}: {body} | {self._listed(name)} | {self._mapping(None, 0)}"
        return name

    def _written(self, value: Any) -> str:
        """The term of one value."""
        style = self._style
        if isinstance(value, str):
            return style.quote(value)
        if value is None or isinstance(value, bool):
            return literal(style.words[value])
        if isinstance(value, list):
            items = [self._written(item) for item in value]
            return self._row("[", items, "]")
        if isinstance(value, Mapping):
            members = [
                join(literal(style.key(str(key))), self._written(item))
                for key, item in value.items()
            ]
            return self._row("{", members, "}")
        return literal(json.dumps(value))

    def _row(self, opening: str, terms: list[str], closing: str) -> str:
        comma = f" {literal(self._style.comma)} "
        return join(literal(opening), comma.join(terms), literal(closing))
