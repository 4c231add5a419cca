"""Lark grammars (llguidance's dialect) of tool calls, put together from a dialect's own pieces."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from opsin.errors import InputError
from opsin.prompt.json_schema import JSON_SPACING

# How deep a schema may be nested, counted in objects and lists.
_MAX_DEPTH = 128
ANY_TEXT = "/(?s:.*)/"
# Keywords that may add properties beside those that the schema lists itself.
_COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties")


class HasSchema(Protocol):
    """What a grammar needs to know of a tool."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Mapping[str, Any]: ...

    @property
    def strict(self) -> bool: ...


class Marks:
    """Writes texts and markers as grammar terms, given which markers are special tokens."""

    def __init__(self, special: Mapping[str, int] | None) -> None:
        self._special = dict(special or {})

    def is_special(self, text: str) -> bool:
        """Whether a marker is a special token, which no text of the grammar can match."""
        return text in self._special

    def term(self, text: str) -> str:
        """A marker or any other text as a term."""
        if text in self._special:
            return f"<[{self._special[text]}]>"
        return literal(text)


def literal(text: str) -> str:
    """A text that stands as it is; nothing for an empty one."""
    return json.dumps(text, ensure_ascii=False) if text else ""


def join(*terms: str) -> str:
    """Terms in a row."""
    return " ".join(term for term in terms if term)


@dataclass(frozen=True)
class Form:
    """The calls of an answer: `trigger head call (joint call)* tail`, each a row of terms.

    `trigger` is one marker ("" where only their form tells calls from text); `rules` are the named
    rules that the terms use.
    """

    trigger: str
    call: str
    head: str = ""
    joint: str = ""
    tail: str = ""
    rules: Sequence[str] = field(default_factory=tuple)

    def grammar(self, marks: Marks, parallel: bool) -> str:
        """The grammar of calls and nothing else."""
        calls = join(marks.term(self.trigger), self._calls(parallel))
        return self._text(f"start: {calls}")

    def lazy_grammar(self, marks: Marks, parallel: bool) -> str | None:
        """The grammar of text in which calls, once opened, have this form."""
        if not self.trigger:
            return None
        if marks.is_special(self.trigger):
            opening = [f"opening: FREE {marks.term(self.trigger)}"]
        else:
            opening = [f"opening[lazy]: FREE {marks.term(self.trigger)}"]
        calls = join("opening", self._calls(parallel))
        return self._text(f"start: FREE | {calls}", *opening, f"FREE: {ANY_TEXT}")

    def _calls(self, parallel: bool) -> str:
        again = f"({join(self.joint, self.call)})*" if parallel else ""
        return join(self.head, self.call, again, self.tail)

    def _text(self, *rules: str) -> str:
        return "\n".join(["%llguidance {}", *rules, *self.rules]) + "\n"


def check_depth(tools: Sequence[HasSchema]) -> None:
    """Raise InputError for a schema that is nested too deeply to be walked through."""
    for tool in tools:
        level: list[Any] = [tool.parameters]
        for _ in range(_MAX_DEPTH):
            level = [part for value in level for part in _parts(value)]
        if level:
            raise InputError(
                f"The parameters of {tool.name[:80]!r} are nested too deeply",
                why=f"more than {_MAX_DEPTH} levels",
                param="tools",
            )


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def schema_of(tool: HasSchema) -> dict[str, Any]:
    """The schema of a tool's arguments as an object: without any, it takes none.

    Properties that an object's schema does not list are not written, unless it says otherwise.
    """
    schema = dict(tool.parameters)
    if not schema:
        schema = {"properties": {}}
    schema.setdefault("type", "object")
    if "properties" in schema and not any(key in schema for key in _COMBINING):
        schema.setdefault("additionalProperties", False)
    return schema


def json_term(schema: Mapping[str, Any], strict: bool) -> str:
    """JSON of a schema; unless strict, what the grammar has no means for is let through."""
    leniency = {"coerce_one_of": True} if strict else {"lenient": True}
    guidance = {"x-guidance": {**JSON_SPACING, **leniency}}
    return "%json " + json.dumps({**guidance, **schema})


def json_object_calls(
    tools: Sequence[HasSchema], name_key: str = "name", arguments_key: str = "arguments"
) -> list[str]:
    """Rules in which `object` is one call of any tool, as a JSON object."""
    rules = [f"object: {' | '.join(f'object_{i}' for i in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        opening = f'{{"{name_key}": {json.dumps(tool.name)}, "{arguments_key}": '
        arguments = json_term(schema_of(tool), tool.strict)
        rules.append(f"object_{index}: {literal(opening)} arguments_{index} {literal('}')}")
        rules.append(f"arguments_{index}: {arguments}")
    return rules
