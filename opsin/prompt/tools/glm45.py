"""Calls as a name and pairs of tags: `<tool_call>name<arg_key>..</arg_key><arg_value>..`."""

from collections.abc import Mapping, Sequence
from typing import Any

from opsin.prompt.tools.dialect import Dialect, Output, Reader, Tool
from opsin.prompt.tools.grammars import Form, Marks, join, literal
from opsin.prompt.tools.parameter_grammars import ArgumentTags, argument_rules
from opsin.prompt.tools.tape import Markers, Steps, Tape
from opsin.prompt.tools.typed_values import ArgumentsWriter

_START = "<tool_call>"
_END = "</tool_call>"
_KEY = "<arg_key>"
_KEY_END = "</arg_key>"
_VALUE = "<arg_value>"
_VALUE_END = "</arg_value>"

_TAGS = ArgumentTags(
    key_start=(_KEY,),
    value_start=(_KEY_END, "\n", _VALUE),
    value_end=(_VALUE_END,),
    after="\n",
)
_STARTS = Markers(_START)
_AFTER_NAME = Markers("\n", _KEY, _END, _START)
_KEY_ENDS = Markers(_KEY_END, _END, _START)
_VALUE_ENDS = Markers(_VALUE_END, _END)


class KeysAndValues(Dialect):
    """A name, then keys and values in turn, each between tags of its own."""

    name = "glm45"
    markers = (_START, _END, _KEY, _KEY_END, _VALUE, _VALUE_END)
    starts = (_START,)

    def reader(self, tools: Sequence[Tool]) -> Reader:
        parameters = {tool.name: tool.parameters for tool in tools}
        return Reader(lambda tape, output: _parse(tape, output, parameters))

    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        for index, tool in enumerate(tools):
            name = literal(f"{tool.name}\n")
            rules.append(f"call_{index}: {name} arguments_{index} {marks.term(_END)}")
            rules += argument_rules(tool, f"arguments_{index}", _TAGS, marks)
        joint = join(literal("\n"), marks.term(_START))
        return Form(trigger=_START, call="call", joint=joint, rules=rules)


def _parse(tape: Tape, output: Output, tools: Mapping[str, Mapping[str, Any]]) -> Steps[None]:
    while (yield from tape.until(_STARTS, output.text)):
        tape.keep()
        pieces: list[str] = []
        yield from tape.until(_AFTER_NAME, pieces.append, unread=(_KEY, _END, _START))
        kept = tape.kept()
        name = "".join(pieces).strip()
        if not name or tape.is_over:
            output.text(_START + kept)
            continue
        output.start(name)
        whole = yield from _read_arguments(tape, output, tools.get(name, {}))
        yield from tape.leave_block(whole, _END, _START)


def _read_arguments(tape: Tape, output: Output, parameters: Mapping[str, Any]) -> Steps[bool]:
    """Read the pairs of an open call and end it; False where they break off."""
    writer = ArgumentsWriter(output.arguments, parameters)
    while True:
        yield from tape.spaces()
        if not (yield from tape.accept(_KEY)):
            break
        key: list[str] = []
        if (yield from tape.until(_KEY_ENDS, key.append, unread=(_END, _START))) != _KEY_END:
            break
        yield from tape.spaces()
        if not (yield from tape.accept(_VALUE)):
            break
        value = writer.value(writer.key("".join(key).strip()))
        if not (yield from tape.until(_VALUE_ENDS, value.add, unread=(_END,))):
            output.end(broken_off=True)
            return False
        value.close(keep_newline=True)
    if not tape.is_over:
        writer.close()
    whole = not tape.is_over and (yield from tape.peek()) == "<"
    output.end(broken_off=tape.is_over)
    return whole
