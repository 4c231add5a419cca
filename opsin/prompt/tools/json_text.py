"""JSON in text that arrives in pieces: a value copied as it comes, a string decoded."""

import json
import re

from opsin.prompt.tools.tape import Put, Steps, Tape

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_BETWEEN = re.compile(r"[ \t\r\n:,]+")
_SCALAR = re.compile(r"[A-Za-z0-9+\-.]+")
_CLOSERS = {"{": "}", "[": "]"}


def copy_value(tape: Tape, put: Put) -> Steps[bool]:
    """Hand on the JSON value that comes next, as it is written; False where it breaks off.

    What is looked at are strings and brackets. Control characters inside a string, which JSON does
    not allow but models write, are escaped.
    """
    closers: list[str] = []
    while True:
        char = yield from tape.peek()
        if char == '"':
            if not (yield from copy_string(tape, put)):
                return False
        elif char in _CLOSERS:
            closers.append(_CLOSERS[char])
            put((yield from tape.next()))
        elif closers and char == closers[-1]:
            closers.pop()
            put((yield from tape.next()))
        elif char and _SCALAR.match(char):
            yield from tape.run(_SCALAR, put)
        elif not (closers and char and _BETWEEN.match(char)):
            return False
        else:
            yield from tape.run(_BETWEEN, put)
            continue
        if not closers:
            return True


def copy_string(tape: Tape, put: Put) -> Steps[bool]:
    """Hand on the JSON string that comes next, quotes included; False where the text ends."""
    put((yield from tape.next()))
    while True:
        yield from tape.run(_PLAIN, put)
        char = yield from tape.next()
        if char == '"':
            put(char)
            return True
        if char == "\\":
            # Together, so that a piece never ends inside an escape.
            following = yield from tape.next()
            if following:
                put(char + following)
        elif char:
            put(json.dumps(char)[1:-1])
        if not char:
            return False


def read_string(tape: Tape) -> Steps[str | None]:
    """The JSON string that comes next, decoded; None (nothing read) if there is none.

    A string that the text breaks off in, or that cannot be decoded, gives None too.
    """
    if (yield from tape.peek()) != '"':
        return None
    pieces: list[str] = []
    whole = yield from copy_string(tape, pieces.append)
    return decoded("".join(pieces)) if whole else None


def decoded(text: str) -> str | None:
    """A JSON string's value, or None if the text is no such string."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None
