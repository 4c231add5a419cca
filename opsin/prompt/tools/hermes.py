"""Calls as JSON between tags: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from collections.abc import Sequence

from opsin.prompt.tools.dialect import Dialect, Output, Reader, Tool
from opsin.prompt.tools.grammars import Form, Marks, join, json_object_calls
from opsin.prompt.tools.json_calls import read_objects
from opsin.prompt.tools.tape import Markers, Steps, Tape

_START = "<tool_call>"
_END = "</tool_call>"


class Hermes(Dialect):
    """JSON objects between tags, one a block; several in a block are read too."""

    name = "hermes"
    markers = (_START, _END)
    starts = (_START,)

    def reader(self, tools: Sequence[Tool]) -> Reader:
        return Reader(_parse)

    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        start, end = marks.term(_START), marks.term(_END)
        return Form(
            trigger=_START,
            head=r'"\n"',
            call="object",
            joint=join(r'"\n"', end, r'"\n"', start, r'"\n"'),
            tail=join(r'"\n"', end),
            rules=json_object_calls(tools),
        )


def _parse(tape: Tape, output: Output) -> Steps[None]:
    start = Markers(_START)
    while (yield from tape.until(start, output.text)):
        before = output.num_calls
        whole = yield from read_objects(tape, output, _START)
        if output.num_calls > before:
            yield from tape.leave_block(whole, _END, _START)
