"""Calls as nested tags: `<tool_call><function=name><parameter=key>value</parameter>...`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opsin.prompt.tools.dialect import Dialect, Output, Reader, Tool
from opsin.prompt.tools.grammars import Form, Marks, join, literal
from opsin.prompt.tools.parameter_grammars import ArgumentTags, argument_rules
from opsin.prompt.tools.tape import Markers, Steps, Tape
from opsin.prompt.tools.typed_values import ArgumentsWriter

_START = "<tool_call>"
_END = "</tool_call>"
_FUNCTION = "<function="
_FUNCTION_END = "</function>"
_PARAMETER = "<parameter="
_PARAMETER_END = "</parameter>"

_NAME = re.compile(r"[^<>\s]+")
# A value ends at its tag, or where that is missing before the next one on a line of its own.
_NEXT = (f"\n{_PARAMETER}", f"\n{_FUNCTION_END}")
_VALUE_ENDS = Markers(_PARAMETER_END, *_NEXT)
_STARTS = Markers(_START, _FUNCTION)

_TAGS = ArgumentTags(
    key_start=(_PARAMETER,), value_start=(">\n",), value_end=(f"\n{_PARAMETER_END}",), after="\n"
)


class TaggedParameters(Dialect):
    """A tag for the function and one for each of its parameters, whose value is bare text."""

    name = "qwen3_coder"
    markers = (_START, _END)
    starts = (_START,)

    def reader(self, tools: Sequence[Tool]) -> Reader:
        parameters = {tool.name: tool.parameters for tool in tools}
        return Reader(lambda tape, output: _parse(tape, output, parameters))

    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        for index, tool in enumerate(tools):
            opening = literal(f"{_FUNCTION}{tool.name}>\n")
            rules.append(f"call_{index}: {opening} arguments_{index} {literal(_FUNCTION_END)}")
            rules += argument_rules(tool, f"arguments_{index}", _TAGS, marks)
        newline = literal("\n")
        end = join(newline, marks.term(_END))
        return Form(
            trigger=_START,
            head=newline,
            call="call",
            joint=join(end, newline, marks.term(_START), newline),
            tail=end,
            rules=rules,
        )


def _parse(tape: Tape, output: Output, tools: Mapping[str, Mapping[str, Any]]) -> Steps[None]:
    while True:
        opening = yield from tape.until(_STARTS, output.text)
        if not opening:
            return
        before = output.num_calls
        whole = yield from _read_block(tape, output, tools, opening)
        if output.num_calls > before:
            yield from tape.leave_block(whole, _END, _START)


def _read_block(
    tape: Tape, output: Output, tools: Mapping[str, Mapping[str, Any]], opening: str
) -> Steps[bool]:
    """Read the functions of a block; whether they were whole."""
    before = output.num_calls
    found = opening == _FUNCTION
    while True:
        tape.keep()
        yield from tape.spaces()
        if not found and not (yield from tape.accept(_FUNCTION)):
            break
        name = yield from tape.word(_NAME)
        if not name or not (yield from tape.accept(">")):
            break
        tape.kept()
        found = False
        output.start(name)
        if not (yield from _read_arguments(tape, output, tools.get(name, {}))):
            return False
    if output.num_calls == before:
        output.text(opening + tape.kept())
        return False
    return not tape.kept().strip()


def _read_arguments(tape: Tape, output: Output, parameters: Mapping[str, Any]) -> Steps[bool]:
    """Read the parameters of an open call and end it; False where they break off."""
    writer = ArgumentsWriter(output.arguments, parameters)
    while True:
        yield from tape.spaces()
        if not (yield from tape.accept(_PARAMETER)):
            break
        key = yield from tape.word(_NAME)
        if not key or not (yield from tape.accept(">")):
            break
        yield from tape.accept("\n")
        value = writer.value(writer.key(key))
        end = yield from tape.until(_VALUE_ENDS, value.add, unread=_NEXT)
        if not end:
            output.end(broken_off=True)
            return False
        value.close(keep_newline=False)
    whole = yield from tape.accept(_FUNCTION_END)
    if whole or not tape.is_over:
        writer.close()
    output.end(broken_off=tape.is_over)
    return whole
