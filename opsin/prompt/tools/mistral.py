"""Calls behind `[TOOL_CALLS]`: a JSON list, or a name and `[ARGS]` with a JSON object."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opsin.prompt.tools.dialect import Dialect, Output, Reader, Tool
from opsin.prompt.tools.grammars import (
    Form,
    Marks,
    join,
    json_object_calls,
    json_term,
    literal,
    schema_of,
)
from opsin.prompt.tools.history import with_short_ids
from opsin.prompt.tools.json_calls import read_objects
from opsin.prompt.tools.json_text import copy_value
from opsin.prompt.tools.tape import Markers, Steps, Tape

_START = "[TOOL_CALLS]"
_CALL_ID = "[CALL_ID]"
_ARGS = "[ARGS]"
_ID = "/[A-Za-z0-9]{9}/"

_STARTS = Markers(_START)
_NAME = re.compile(r"[^\[\]{}\s]+")


class MarkedCalls(Dialect):
    """All forms are read; which one is written is the checkpoint's.

    tags: what stands between a name and its arguments, or nothing for the list.
    """

    starts = (_START,)

    def __init__(self, name: str, tags: tuple[str, ...]) -> None:
        self.name = name
        self.markers = (_START, _CALL_ID, _ARGS)
        self._tags = tags

    def reader(self, tools: Sequence[Tool]) -> Reader:
        return Reader(_parse)

    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        if not self._tags:
            return Form(
                trigger=_START,
                head=literal("["),
                call="object",
                joint=literal(", "),
                tail=literal("]"),
                rules=json_object_calls(tools),
            )
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
        for index, tool in enumerate(tools):
            between = [join(marks.term(tag), _ID if tag == _CALL_ID else "") for tag in self._tags]
            rules.append(f"call_{index}: {join(literal(tool.name), *between)} arguments_{index}")
            rules.append(f"arguments_{index}: {json_term(schema_of(tool), tool.strict)}")
        return Form(trigger=_START, call="call", joint=marks.term(_START), rules=rules)

    def prepare_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
    ) -> list[dict[str, Any]]:
        return with_short_ids(super().prepare_messages(messages, tools, template))


def _parse(tape: Tape, output: Output) -> Steps[None]:
    while (yield from tape.until(_STARTS, output.text)):
        tape.keep()
        yield from tape.spaces()
        space = tape.kept()
        if (yield from tape.peek()) in ("[", "{"):
            before = output.num_calls
            whole = yield from read_objects(tape, output, _START + space)
            if output.num_calls > before:
                yield from tape.leave_block(whole, "\n", _START)
        else:
            yield from _read_named(tape, output, _START + space)


def _read_named(tape: Tape, output: Output, opening: str) -> Steps[None]:
    """Read a name, perhaps an id, and arguments."""
    tape.keep()
    name = yield from tape.word(_NAME)
    yield from tape.spaces()
    if (yield from tape.accept(_CALL_ID)):
        yield from tape.word(_NAME)
        yield from tape.spaces()
    marked = yield from tape.accept(_ARGS)
    yield from tape.spaces()
    if not name or not (marked or (yield from tape.peek()) == "{"):
        output.text(opening + tape.kept())
        return
    tape.kept()
    output.start(name)
    yield from copy_value(tape, output.arguments)
    output.end(broken_off=tape.is_over)


def listed() -> MarkedCalls:
    """A JSON list."""
    return MarkedCalls("mistral", ())


def with_ids() -> MarkedCalls:
    """A name, an id and arguments."""
    return MarkedCalls("mistral_call_id", (_CALL_ID, _ARGS))


def with_arguments() -> MarkedCalls:
    """A name and arguments."""
    return MarkedCalls("mistral_args", (_ARGS,))
