"""Calls written as JSON objects with a name and arguments, alone or in a list.

The name may stand before or after the arguments, which may be an object or a string that holds one.
A name opens the call, so that arguments behind it are given out as they come.
"""

from collections.abc import Collection
from dataclasses import dataclass

from opsin.prompt.tools.dialect import Output
from opsin.prompt.tools.json_text import copy_value, read_string
from opsin.prompt.tools.tape import Put, Steps, Tape, drop

_ARGUMENTS = ("arguments", "parameters")
_KNOWN = ("name", "type", "id", *_ARGUMENTS)


@dataclass(frozen=True, slots=True)
class ObjectRules:
    """What makes an object a call.

    `names`: the only names that count, or None for any. `only_known_keys`: an object that begins
    with any other key is no call. Both are for dialects that put no marker before a call.
    """

    names: Collection[str] | None = None
    only_known_keys: bool = False


ANY_OBJECT = ObjectRules()


def read_objects(
    tape: Tape, output: Output, opening: str = "", rules: ObjectRules = ANY_OBJECT
) -> Steps[bool]:
    """Read the calls that come next: `{...}`, several with separators, or `[{...}, ...]`.

    `opening` is the marker in front, given out as text if no call follows. Returns whether all was
    whole.
    """
    before = output.num_calls
    tape.keep()
    yield from tape.spaces()
    listed = yield from tape.accept("[")
    whole = True
    while whole and (yield from _is_object(tape)):
        whole = yield from _read_object(tape, output, rules)
        if output.num_calls > before:
            tape.kept()
    if output.num_calls == before:
        output.text(opening + tape.kept())
        return False
    return whole and (not listed or (yield from tape.accept("]")))


def _is_object(tape: Tape) -> Steps[bool]:
    """Whether an object comes next, after white space and separators."""
    while True:
        yield from tape.spaces()
        char = yield from tape.peek()
        if char not in (",", ";"):
            return char == "{"
        yield from tape.next()


def _read_object(tape: Tape, output: Output, rules: ObjectRules) -> Steps[bool]:
    """Read one object; False if it is no call, or breaks off."""
    call = _Call(output)
    yield from tape.next()
    while True:
        yield from tape.spaces()
        while (yield from tape.accept(",")):
            yield from tape.spaces()
        if (yield from tape.accept("}")):
            output.end()
            return call.is_open
        key = yield from read_string(tape)
        yield from tape.spaces()
        if key is None or not (yield from tape.accept(":")):
            break
        if rules.only_known_keys and not call.is_open and key not in _KNOWN:
            break
        yield from tape.spaces()
        if not (yield from _read_member(tape, call, key, rules)):
            break
    output.end(broken_off=tape.is_over)
    return False


class _Call:
    """An object on its way to becoming a call: arguments that come before the name are held."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._held: list[str] = []
        self.is_open = False
        self.has_arguments = False

    def open(self, name: str) -> None:
        self.is_open = True
        self._output.start(name)
        self._output.arguments("".join(self._held))

    @property
    def put(self) -> Put:
        """Where arguments go."""
        return self._output.arguments if self.is_open else self._held.append


def _read_member(tape: Tape, call: _Call, key: str, rules: ObjectRules) -> Steps[bool]:
    """Read the value of a key; False if it breaks off, or makes this no call."""
    if key == "name" and not call.is_open:
        name = yield from read_string(tape)
        if not name or (rules.names is not None and name not in rules.names):
            return False
        call.open(name)
        return True
    if key not in _ARGUMENTS or call.has_arguments:
        return (yield from copy_value(tape, drop))
    call.has_arguments = True
    return (yield from _read_arguments(tape, call.put))


def _read_arguments(tape: Tape, put: Put) -> Steps[bool]:
    char = yield from tape.peek()
    if char == '"':
        text = yield from read_string(tape)
        put(text or "")
        return text is not None
    return (yield from copy_value(tape, drop if char == "n" else put))
