"""Values in notations other than JSON, turned into JSON as they come."""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from opsin.prompt.tools.tape import Markers, Put, Steps, Tape
from opsin.prompt.tools.typed_values import STRING, as_json, escaped

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_HEX = re.compile(r"[0-9a-fA-F]")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": "", "a": "\a", "v": "\v"}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


@dataclass(frozen=True)
class Notation:
    """How values are written.

    quotes: opening to closing text of strings, longer ones first; those in `raw` know no escapes.
    brackets: opening to closing character. words: what stands for JSON's own words. bare: the
    characters of a number, a word, or a string without quotes. bare_key: those of a key without.
    """

    quotes: Mapping[str, str]
    brackets: Mapping[str, str]
    words: Mapping[str, str]
    bare: re.Pattern[str]
    bare_key: re.Pattern[str]
    raw: frozenset[str] = frozenset()
    ends: dict[str, Markers] = field(init=False)
    openings: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        closers = {
            opening: Markers(closer) if opening in self.raw else Markers(closer, "\\")
            for opening, closer in self.quotes.items()
        }
        object.__setattr__(self, "ends", closers)
        object.__setattr__(self, "openings", tuple(self.quotes))


def copy_argument(tape: Tape, put: Put, notation: Notation, types: frozenset[str]) -> Steps[bool]:
    """Hand on an argument's value, as JSON of one of these types; False where it breaks off.

    A string where none is allowed is read for the value in it; a bare word where only strings are
    allowed is one.
    """
    if (yield from tape.peek()) in notation.brackets:
        return (yield from copy_literal(tape, put, notation))
    if types == STRING:
        return (yield from _copy_simple(tape, put, notation, is_text=True))
    if not types or "string" in types:
        return (yield from _copy_simple(tape, put, notation))
    pieces: list[str] = []
    whole = yield from _copy_simple(tape, pieces.append, notation)
    text = "".join(pieces)
    put(as_json(json.loads(text), types) if whole and text.startswith('"') else text)
    return whole


class _Frame:
    """An object or list that is open."""

    def __init__(self, closer: str, is_object: bool) -> None:
        self.closer = closer
        self.is_object = is_object
        self.is_empty = True
        self.after_comma = True


def copy_literal(tape: Tape, put: Put, notation: Notation) -> Steps[bool]:
    """Hand on the value that comes next, as JSON; False where it breaks off.

    Open brackets are kept in a list, so that how deep they go does not matter.
    """
    frames: list[_Frame] = []
    while True:
        yield from tape.spaces()
        if frames:
            frame = frames[-1]
            if (yield from tape.accept(frame.closer)):
                frames.pop()
                put("}" if frame.is_object else "]")
                if not frames:
                    return True
                continue
            if not frame.after_comma:
                if not (yield from tape.accept(",")):
                    return False
                frame.after_comma = True
                continue
            if not (yield from _begin_item(tape, put, notation, frame)):
                return False
        char = yield from tape.peek()
        if char in notation.brackets:
            yield from tape.next()
            frames.append(_Frame(notation.brackets[char], char == "{"))
            put("{" if char == "{" else "[")
        elif not (yield from _copy_simple(tape, put, notation)):
            return False
        elif not frames:
            return True


def _begin_item(tape: Tape, put: Put, notation: Notation, frame: _Frame) -> Steps[bool]:
    """What stands before an item: the comma and, in an object, the key. False if it breaks off."""
    comma = "" if frame.is_empty else ", "
    frame.is_empty = False
    frame.after_comma = False
    if not frame.is_object:
        if (yield from tape.peek()):
            put(comma)
        return True
    key = yield from read_key(tape, notation)
    yield from tape.spaces()
    if key is None or not (yield from tape.accept(":")):
        return False
    put(f"{comma}{json.dumps(key, ensure_ascii=False)}: ")
    yield from tape.spaces()
    return True


def read_key(tape: Tape, notation: Notation) -> Steps[str | None]:
    """The key that comes next, in quotes or bare; None if there is none."""
    opening = yield from _accept_quote(tape, notation)
    if not opening:
        return (yield from tape.word(notation.bare_key)).strip() or None
    pieces: list[str] = []
    if not (yield from _copy_string(tape, pieces.append, notation, opening)):
        return None
    text: str = json.loads("".join(['"', *pieces, '"']))
    return text


def _copy_simple(tape: Tape, put: Put, notation: Notation, is_text: bool = False) -> Steps[bool]:
    """Hand on a string, a number or a word, which with `is_text` is a string too."""
    opening = yield from _accept_quote(tape, notation)
    if opening:
        put('"')
        whole = yield from _copy_string(tape, put, notation, opening)
        put('"' if whole else "")
        return whole
    word = (yield from tape.word(notation.bare)).strip()
    if not word or tape.is_over:
        return False
    put(json.dumps(word, ensure_ascii=False) if is_text else word_as_json(word, notation))
    return True


def word_as_json(word: str, notation: Notation) -> str:
    """A bare word as JSON: a word with a meaning, a number, or else a string."""
    if word in notation.words:
        return notation.words[word]
    if _NUMBER.fullmatch(word):
        return word
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            number = kind(word)
            return json.dumps(number if math.isfinite(number) else word)
    return json.dumps(word, ensure_ascii=False)


def _accept_quote(tape: Tape, notation: Notation) -> Steps[str]:
    for opening in notation.openings:
        if (yield from tape.accept(opening)):
            return opening
    return ""


def _copy_string(tape: Tape, put: Put, notation: Notation, opening: str) -> Steps[bool]:
    """Hand on a string's characters, escaped for JSON, up to its closing quotes."""
    ends = notation.ends[opening]
    while True:
        found = yield from tape.until(ends, lambda piece: put(escaped(piece)))
        if not found or found == notation.quotes[opening]:
            return bool(found)
        yield from _copy_escape(tape, put)


def _copy_escape(tape: Tape, put: Put) -> Steps[None]:
    """Hand on what stands behind a backslash."""
    char = yield from tape.next()
    if char in _HEX_ESCAPES:
        digits = ""
        while len(digits) < _HEX_ESCAPES[char] and _HEX.match((yield from tape.peek())):
            digits += yield from tape.next()
        code = int(digits, 16) if len(digits) == _HEX_ESCAPES[char] else -1
        # A surrogate stays an escape: together with the next one it stands for a character.
        if 0xD800 <= code < 0xE000:
            put(f"\\u{code:04x}")
        elif 0 <= code <= 0x10FFFF:
            put(escaped(chr(code)))
        else:
            put(escaped(f"\\{char}{digits}"))
    elif char in _ESCAPES:
        put(escaped(_ESCAPES[char]))
    elif char:
        put(escaped(char if char in "\\'\"" else f"\\{char}"))
