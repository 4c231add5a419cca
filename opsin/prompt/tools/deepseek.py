"""Calls between markers of their own, whose bars are wide (U+FF5C): tool calls begin, end, ..."""

from collections.abc import Sequence

from opsin.prompt.tools.dialect import Dialect, Output, Reader, Tool
from opsin.prompt.tools.grammars import Form, Marks, join, json_term, literal, schema_of
from opsin.prompt.tools.json_text import copy_value
from opsin.prompt.tools.tape import Markers, Steps, Tape

ALL_START = "<\uff5ctool▁calls▁begin\uff5c>"
_ALL_END = "<\uff5ctool▁calls▁end\uff5c>"
_START = "<\uff5ctool▁call▁begin\uff5c>"
_END = "<\uff5ctool▁call▁end\uff5c>"
_SEPARATOR = "<\uff5ctool▁sep\uff5c>"
_KIND = "function"
_FENCE = "```json\n"
_FENCE_END = "\n```"

_OPENINGS = Markers(ALL_START, _START)
_AFTER_NAME = Markers(_SEPARATOR, "\n", _END, _ALL_END, _START)
_STOPS = (_END, _ALL_END, _START)


class SeparatedCalls(Dialect):
    """Name and arguments around a separator; both forms are read.

    With `fenced` the separator stands between the word "function" and the name, and the arguments
    in a code block; without, between the name and the arguments.
    """

    markers = (ALL_START, _ALL_END, _START, _END, _SEPARATOR)
    starts = (ALL_START, _START)

    def __init__(self, name: str, fenced: bool) -> None:
        self.name = name
        self._fenced = fenced

    def reader(self, tools: Sequence[Tool]) -> Reader:
        return Reader(_parse)

    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        separator = marks.term(_SEPARATOR)
        for index, tool in enumerate(tools):
            if self._fenced:
                name = join(literal(_KIND), separator, literal(f"{tool.name}\n{_FENCE}"))
            else:
                name = join(literal(tool.name), separator)
            fence = literal(_FENCE_END) if self._fenced else ""
            end = join(fence, marks.term(_END))
            rules.append(f"call_{index}: {marks.term(_START)} {name} arguments_{index} {end}")
            rules.append(f"arguments_{index}: {json_term(schema_of(tool), tool.strict)}")
        joint = literal("\n") if self._fenced else ""
        tail = marks.term(_ALL_END)
        return Form(trigger=ALL_START, call="call", joint=joint, tail=tail, rules=rules)


def _parse(tape: Tape, output: Output) -> Steps[None]:
    while True:
        opening = yield from tape.until(_OPENINGS, output.text)
        if not opening:
            return
        if opening == ALL_START:
            yield from _read_block(tape, output)
        elif (yield from _read_call(tape, output, opening)):
            yield from tape.accept(_ALL_END)


def _read_block(tape: Tape, output: Output) -> Steps[None]:
    """Read calls up to the marker that ends them all."""
    tape.keep()
    yield from tape.spaces()
    opening = ALL_START + tape.kept()
    while (yield from tape.accept(_START)):
        if not (yield from _read_call(tape, output, opening + _START)):
            return
        opening = ""
        yield from tape.spaces()
    if opening:
        output.text(opening)
    else:
        yield from tape.accept(_ALL_END)


def _read_call(tape: Tape, output: Output, opening: str) -> Steps[bool]:
    """Read one call behind its marker; False if it is none."""
    tape.keep()
    name = yield from _read_name(tape)
    if not name:
        output.text(opening + tape.kept())
        return False
    tape.kept()
    output.start(name)
    yield from tape.spaces()
    fenced = yield from tape.accept("```")
    if fenced:
        yield from tape.accept("json")
        yield from tape.spaces()
    whole = yield from copy_value(tape, output.arguments)
    output.end(broken_off=tape.is_over)
    if whole:
        yield from tape.spaces()
        yield from tape.accept("```")
    yield from tape.leave_block(whole, _END, _START, _ALL_END)
    return True


def _read_name(tape: Tape) -> Steps[str]:
    """The name of a call, in either form; "" if there is none."""
    pieces: list[str] = []
    found = yield from tape.until(_AFTER_NAME, pieces.append, unread=_STOPS)
    first = "".join(pieces).strip()
    if found != _SEPARATOR:
        return ""
    if first != _KIND or (yield from tape.peek()) == "{":
        return first
    pieces.clear()
    found = yield from tape.until(_AFTER_NAME, pieces.append, unread=_STOPS)
    return "".join(pieces).strip() if found == "\n" else ""


def fenced() -> SeparatedCalls:
    """Arguments in a code block."""
    return SeparatedCalls("deepseek_v3", fenced=True)


def plain() -> SeparatedCalls:
    """Arguments right behind the separator."""
    return SeparatedCalls("deepseek_v31", fenced=False)
