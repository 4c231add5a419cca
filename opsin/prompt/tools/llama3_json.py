"""Calls as bare JSON: `{"name": ..., "parameters": {...}}`, with or without a marker in front."""

from collections.abc import Mapping, Sequence
from typing import Any

from opsin.prompt.tools.dialect import Dialect, Output, Reader, Tool
from opsin.prompt.tools.grammars import Form, Marks, json_object_calls, literal
from opsin.prompt.tools.history import with_single_calls
from opsin.prompt.tools.json_calls import ObjectRules, read_objects
from opsin.prompt.tools.tape import Markers, Steps, Tape

_TAG = "<|python_tag|>"
_START = "<|python_start|>"
_END = "<|python_end|>"
# What templates say that refuse a message with several calls.
_SINGLE = "only supports single tool-calls"

_BEFORE = Markers(_TAG, _START)


class BareJson(Dialect):
    """JSON objects at the start of the answer, or after a marker.

    Without a marker only the tools' own names count, in objects that begin as calls do.
    """

    name = "llama3_json"
    markers = (_TAG, _START, _END)
    starts = ("{", _TAG, _START)

    def reader(self, tools: Sequence[Tool]) -> Reader:
        bare = ObjectRules(frozenset(tool.name for tool in tools), only_known_keys=True)
        return Reader(lambda tape, output: _parse(tape, output, bare))

    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        return Form(
            trigger="",
            call="object",
            joint=literal("; "),
            rules=json_object_calls(tools, arguments_key="parameters"),
        )

    def prepare_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
    ) -> list[dict[str, Any]]:
        chat = super().prepare_messages(messages, tools, template)
        return with_single_calls(chat) if _SINGLE in (template or "") else chat


def _parse(tape: Tape, output: Output, bare: ObjectRules) -> Steps[None]:
    tape.keep()
    yield from tape.spaces()
    opening = tape.kept()
    if (yield from tape.peek()) == "{":
        yield from read_objects(tape, output, opening, bare)
    else:
        output.text(opening)
    while True:
        opening = yield from tape.until(_BEFORE, output.text)
        if not opening:
            return
        yield from read_objects(tape, output, opening)
        yield from tape.spaces()
        yield from tape.accept(_END)
