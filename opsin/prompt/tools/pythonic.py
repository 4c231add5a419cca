"""Calls as a list of Python calls: `[f(a=1, b="x"), g()]`, alone or after a marker."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from opsin.prompt.tools.dialect import Dialect, Output, Reader, Tool
from opsin.prompt.tools.grammars import Form, Marks, literal
from opsin.prompt.tools.literal_grammars import PYTHON, LiteralRules
from opsin.prompt.tools.literals import Notation, copy_argument
from opsin.prompt.tools.tape import Markers, Steps, Tape, drop
from opsin.prompt.tools.typed_values import ArgumentsWriter, properties_of

_START = "<|python_start|>"
_END = "<|python_end|>"
_FENCE = "```tool_code"
_FENCE_END = "```"

_NAME = re.compile(r"[\w.\-]+")

NOTATION = Notation(
    quotes={'"""': '"""', "'''": "'''", '"': '"', "'": "'"},
    brackets={"{": "}", "[": "]", "(": ")"},
    words={
        "True": "true",
        "False": "false",
        "None": "null",
        "true": "true",
        "false": "false",
        "null": "null",
    },
    bare=re.compile(r"[\w.+\-]+"),
    bare_key=re.compile(r"[\w.+\-]+"),
)


class PythonList(Dialect):
    """A list of calls at the start of the answer or of a line, or after its marker.

    Nothing but its form tells a call from text, so only the tools' own names count.
    """

    name = "pythonic"
    markers = (_START, _END)
    starts = ("[", _START)

    def reader(self, tools: Sequence[Tool]) -> Reader:
        parameters = {tool.name: tool.parameters for tool in tools}
        return Reader(lambda tape, output: _parse_list(tape, output, parameters))

    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        rules = call_rules(tools)
        return Form(
            trigger="",
            head=literal("["),
            call="call",
            joint=literal(", "),
            tail=literal("]"),
            rules=rules,
        )


class ToolCode(Dialect):
    """Calls on lines of their own in a code block."""

    name = "tool_code"
    markers = ()
    starts = (_FENCE,)

    def reader(self, tools: Sequence[Tool]) -> Reader:
        parameters = {tool.name: tool.parameters for tool in tools}
        return Reader(lambda tape, output: _parse_code(tape, output, parameters))

    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        newline = literal("\n")
        return Form(
            trigger=_FENCE,
            head=newline,
            call="call",
            joint=newline,
            tail=literal(f"\n{_FENCE_END}"),
            rules=call_rules(tools),
        )


def call_rules(tools: Sequence[Tool]) -> list[str]:
    """Rules in which `call` is one call of any tool."""
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for index, tool in enumerate(tools):
        literals = LiteralRules(PYTHON, f"v{index}", tool)
        arguments = literals.arguments()
        rules.append(f"call_{index}: {literal(f'{tool.name}(')} {arguments} {literal(')')}")
        rules += literals.rules
    return rules


def _parse_list(tape: Tape, output: Output, tools: Mapping[str, Mapping[str, Any]]) -> Steps[None]:
    starts = Markers(_START, "\n[")
    tape.keep()
    yield from tape.spaces()
    opening = tape.kept()
    found = "["
    if not (yield from tape.accept("[")):
        output.text(opening)
        opening, found = "", ""
    while True:
        if not found:
            found = yield from tape.until(starts, output.text)
        if not found:
            return
        opening += found
        if found == _START:
            yield from tape.spaces()
            opening += "[" if (yield from tape.accept("[")) else ""
        before = output.num_calls
        whole = yield from read_calls(tape, output, tools, opening, tools, "]")
        if output.num_calls > before:
            yield from _leave_list(tape, whole)
        opening, found = "", ""


def _leave_list(tape: Tape, whole: bool) -> Steps[None]:
    if whole:
        yield from tape.spaces()
        yield from tape.accept(_END)
    else:
        yield from tape.until(Markers("\n", _END), drop, unread=("\n",))


def _parse_code(tape: Tape, output: Output, tools: Mapping[str, Mapping[str, Any]]) -> Steps[None]:
    while (yield from tape.until(Markers(_FENCE), output.text)):
        before = output.num_calls
        tape.keep()
        yield from tape.spaces()
        listed = yield from tape.accept("[")
        opening = _FENCE + tape.kept()
        closer = "]" if listed else ""
        whole = yield from read_calls(tape, output, tools, opening, None, closer)
        if output.num_calls > before:
            yield from tape.leave_block(whole, _FENCE_END)


def read_calls(
    tape: Tape,
    output: Output,
    tools: Mapping[str, Mapping[str, Any]],
    opening: str,
    names: Collection[str] | None,
    closer: str,
) -> Steps[bool]:
    """Read the calls that come next, up to `closer` if there is one; whether they were whole.

    `opening` was read before, and is text if no call follows. `names`: the only names that count.
    """
    before = output.num_calls
    while True:
        tape.keep()
        yield from tape.spaces()
        while output.num_calls > before and (yield from tape.accept(",")):
            yield from tape.spaces()
        name = yield from tape.word(_NAME)
        known = names is None or name in names
        if not name or not known or not (yield from tape.accept("(")):
            break
        tape.kept()
        output.start(name)
        if not (yield from _read_arguments(tape, output, tools.get(name, {}))):
            return False
    if output.num_calls == before:
        output.text(opening + tape.kept())
        return False
    tape.kept()
    return not name and (not closer or (yield from tape.accept(closer)))


def _read_arguments(tape: Tape, output: Output, parameters: Mapping[str, Any]) -> Steps[bool]:
    """Read the arguments of an open call and end it; False where they break off."""
    writer = ArgumentsWriter(output.arguments, parameters)
    positions = list(properties_of(parameters))
    count = 0
    whole = True
    while whole:
        yield from tape.spaces()
        if (yield from tape.accept(")")):
            writer.close()
            output.end()
            return True
        key = yield from _read_key(tape)
        begins = yield from tape.peek()
        if key is None or not begins or begins in ",)=":
            break
        types = writer.key(key or (positions[count] if count < len(positions) else f"arg{count}"))
        count += 1
        whole = yield from copy_argument(tape, output.arguments, NOTATION, types)
        yield from tape.spaces()
        whole = whole and ((yield from tape.peek()) == ")" or (yield from tape.accept(",")))
    output.end(broken_off=tape.is_over)
    return False


def _read_key(tape: Tape) -> Steps[str | None]:
    """The name in front of an argument; "" for a value without one, None where neither comes.

    A value without a name must not begin like one.
    """
    char = yield from tape.peek()
    if not (char.isalpha() or char == "_"):
        return ""
    key = yield from tape.word(_NAME)
    yield from tape.spaces()
    if not (yield from tape.accept("=")):
        return None
    yield from tape.spaces()
    return key
