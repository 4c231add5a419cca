"""Reads JSON the way models write it: fenced, in prose, cut off, with single quotes or lost
brackets.

One pass over the text with a stack, never backwards: the time is linear in the length whatever the
text holds, and nothing is an error.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_OPENING = re.compile(r"[\[{]")
_TOKEN = re.compile(
    r"[\[\](){},:\"']"
    r"|-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
    r"|[^\W\d][\w.-]*"
)
_END_OF_STRING = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in "\"'"}
_AFTER_STRING = re.compile(r"\s*+(?:[,:\]})]|\Z)")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r"}
_WORDS = {"true": True, "True": True, "false": False, "False": False}
_NULLS = frozenset({"null", "None", "NaN", "nan", "Infinity", "inf"})


def read_values(text: str, *, complete: bool = False) -> list[Any]:
    """Every list and object in the text that stands in no other, in order.

    Objects that lost their end are closed for them. A number that touches the end of the text may
    have lost digits and is left out, unless the text is known to be `complete`.
    """
    reader = _Reader(text, complete)
    position = 0
    while True:
        opening = _OPENING.search(text, position)
        if opening is None:
            return reader.values
        position = reader.read(opening.start())


class _Reader:
    """The stack of lists and objects that are open at one place of the text."""

    def __init__(self, text: str, complete: bool) -> None:
        self.text = text
        self.complete = complete
        self.values: list[Any] = []
        self.stack: list[list[Any] | dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open_lists = 0
        self.at_value = True

    def read(self, position: int) -> int:
        """Read from a bracket to where the last of the stack closes; the position after it."""
        while True:
            token = _TOKEN.search(self.text, position)
            if token is None:
                self.stack.clear()
                self.keys.clear()
                self.open_lists = 0
                return len(self.text)
            position = self.take(token.group(), token.end())
            if not self.stack:
                return position

    def take(self, token: str, end: int) -> int:
        """Act on one token that ends at `end`; the position to go on from."""
        if token in "[({":
            self.open({} if token == "{" else [])
        elif token in "])}":
            self.close(dict if token == "}" else list)
        elif token == ",":
            self.keys[-1] = None
            self.at_value = True
        elif token == ":":
            self.colon()
        elif token in "\"'":
            return self.string(token, end)
        else:
            self.add(self.plain(token, end))
        return end

    def open(self, container: list[Any] | dict[str, Any]) -> None:
        if self.stack:
            self.add(container)
        else:
            self.values.append(container)
        self.stack.append(container)
        self.keys.append(None)
        self.open_lists += isinstance(container, list)
        self.at_value = True

    def close(self, kind: type) -> None:
        """Close the innermost list or object of a kind and all inside it; none open: nothing."""
        there = self.open_lists if kind is list else len(self.stack) - self.open_lists
        while there:
            closed = self.stack.pop()
            self.keys.pop()
            self.open_lists -= isinstance(closed, list)
            if isinstance(closed, kind):
                break
        self.at_value = False

    def colon(self) -> None:
        """A colon inside a list: its last word is a key of the object whose list was not closed."""
        self.at_value = True
        top = self.stack[-1]
        if len(self.stack) < 2 or not isinstance(top, list) or not isinstance(self.stack[-2], dict):
            return
        if top and isinstance(top[-1], str):
            key = top.pop()
            self.close(list)
            self.keys[-1] = key
            self.at_value = True

    def string(self, quote: str, start: int) -> int:
        """Take a string; a quote that no comma, colon or bracket follows belongs to it."""
        if not self.at_value:
            return start
        for mark in _END_OF_STRING[quote].finditer(self.text, start):
            if mark.group() == quote and _AFTER_STRING.match(self.text, mark.end()):
                self.add(unescaped(self.text[start : mark.start()]))
                return mark.end()
        self.add(unescaped(self.text[start:]))
        return len(self.text)

    def plain(self, token: str, end: int) -> Any:
        """A number or a bare word as a value."""
        if token[0] not in "-.0123456789":
            return None if token in _NULLS else _WORDS.get(token, token)
        if end == len(self.text) and not self.complete:
            return None
        number = float(token)
        return number if math.isfinite(number) else None

    def add(self, value: Any) -> None:
        """Put a value into the innermost list or object; there, a first string is its key."""
        top = self.stack[-1]
        self.at_value = False
        if isinstance(top, list):
            top.append(value)
        elif self.keys[-1] is not None:
            top[self.keys[-1]] = value
            self.keys[-1] = None
        elif isinstance(value, str):
            self.keys[-1] = value
        elif value is not None:
            top[f"#{len(top)}"] = value  # a value without a key, as in {{"a": 1}}


def unescaped(raw: str) -> str:
    """A JSON string's content with its escapes resolved, as far as they are valid."""
    if "\\" not in raw:
        return raw
    try:
        text = str(json.loads(f'"{raw}"', strict=False))
    except ValueError:
        text = _ESCAPE.sub(lambda found: _ESCAPED.get(found[1], found[1]), raw)
    # Half a surrogate pair could not be printed or sent.
    return text.encode("utf-8", "replace").decode("utf-8")
