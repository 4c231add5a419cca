"""Calls as one JSON list behind a marker: `<|tool_call|>[{...}, ...]`, `functools[{...}]`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opsin.prompt.tools.dialect import Dialect, Output, Reader, Tool
from opsin.prompt.tools.grammars import Form, Marks, join, json_object_calls, literal
from opsin.prompt.tools.history import with_calls_in_text
from opsin.prompt.tools.json_calls import ObjectRules, read_objects
from opsin.prompt.tools.tape import Markers, Steps, Tape

_TOOL_CALL = "<|tool_call|>"
_TOOL_CALL_END = "<|/tool_call|>"
_TAG = "<tool_call>"
_FUNCTOOLS = "functools"
# The model's own words where there is no system message, and the token that marks a result.
_SYSTEM = "You are a helpful assistant with some tools."
_RESULT_ROLE = "tool_response"


class JsonList(Dialect):
    """A list of JSON objects behind any of several markers, of which the first is its own.

    With `named_only`, for a marker that is an ordinary word, only the tools' own names count.
    """

    def __init__(
        self, name: str, starts: tuple[str, ...], end: str = "", named_only: bool = False
    ) -> None:
        self.name = name
        self.starts = starts
        self.markers = tuple(text for text in (*starts, end) if text.startswith("<"))
        self._end = end
        self._named_only = named_only

    def reader(self, tools: Sequence[Tool]) -> Reader:
        names = frozenset(tool.name for tool in tools) if self._named_only else None
        rules = ObjectRules(names)
        return Reader(lambda tape, output: self._parse(tape, output, rules))

    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        return Form(
            trigger=self.starts[0],
            head=literal("["),
            call="object",
            joint=literal(", "),
            tail=join(literal("]"), marks.term(self._end)),
            rules=json_object_calls(tools),
        )

    def prepare_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
    ) -> list[dict[str, Any]]:
        """As ever; but templates that know no calls get them as text of their messages."""
        if template is None or "tool_calls" in template:
            return super().prepare_messages(messages, tools, template)
        return with_calls_in_text(messages, self._written)

    def _written(self, calls: list[dict[str, Any]]) -> str:
        listed = [{"name": call.get("name"), "arguments": call.get("arguments")} for call in calls]
        return f"{self.starts[0]}{json.dumps(listed, ensure_ascii=False)}{self._end}"

    def _parse(self, tape: Tape, output: Output, rules: ObjectRules) -> Steps[None]:
        starts = Markers(*self.starts)
        while True:
            opening = yield from tape.until(starts, output.text)
            if not opening:
                return
            before = output.num_calls
            whole = yield from read_objects(tape, output, opening, rules)
            if output.num_calls > before:
                # Without a marker at the end, a list that broke off ends with its line.
                yield from tape.leave_block(whole, self._end or "\n", opening)


class MarkedList(JsonList):
    """A list between markers, for templates that read tools as text of the system message.

    They write every other message down as its role and its text.
    """

    def prepare_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
    ) -> list[dict[str, Any]]:
        chat = super().prepare_messages(messages, tools, template)
        if template is None or "message['tools']" not in template:
            return chat
        if tools and not any(message.get("role") == "system" for message in chat):
            chat.insert(0, {"role": "system", "content": _SYSTEM})
        for message in chat:
            if message.get("role") == "tool":
                message["role"] = _RESULT_ROLE
        first = next((message for message in chat if message.get("role") == "system"), None)
        if first is not None and tools:
            first["tools"] = json.dumps([_described(tool) for tool in tools], ensure_ascii=False)
        return chat


def _described(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else tool


def marked_list() -> JsonList:
    """A list between two markers."""
    return MarkedList("phi4_mini", (_TOOL_CALL,), _TOOL_CALL_END)


def open_list() -> JsonList:
    """A list behind a marker, with none at its end."""
    return JsonList("granite", (_TOOL_CALL, _TAG))


def worded_list() -> JsonList:
    """A list behind a word."""
    return JsonList("functools", (_FUNCTOOLS,), named_only=True)
