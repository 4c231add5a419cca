"""Calls in braces with marked strings: `<|tool_call>call:name{key:<|"|>text<|"|>}<tool_call|>`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from opsin.prompt.tools.dialect import Dialect, Output, Reader, Tool
from opsin.prompt.tools.grammars import ANY_TEXT, Form, Marks, join, literal
from opsin.prompt.tools.literal_grammars import LiteralRules, Style
from opsin.prompt.tools.literals import Notation, copy_argument, read_key
from opsin.prompt.tools.tape import Markers, Steps, Tape
from opsin.prompt.tools.typed_values import ArgumentsWriter

_CALL = "call:"
_NAME = re.compile(r"[^{}<>\s]+")
_WORDS = {
    "true": "true",
    "false": "false",
    "null": "null",
    "True": "true",
    "False": "false",
    "None": "null",
    "none": "null",
}


class BracedCalls(Dialect):
    """`call:name{...}` between markers, its strings between marks of their own and keys bare."""

    def __init__(self, name: str, markers: tuple[str, str, str], stop: str) -> None:
        start, end, quote = markers
        self.name = name
        self.markers = markers
        self.stops = (stop,)
        self.starts = (start,)
        self._start = start
        self._end = end
        self._quote = quote
        self._notation = Notation(
            quotes={quote: quote, '"': '"'},
            raw=frozenset({quote}),
            brackets={"{": "}", "[": "]"},
            words=_WORDS,
            bare=re.compile(r"[^,{}\[\]<]+"),
            bare_key=re.compile(r"[^,:{}\[\]<\"]+"),
        )

    def reader(self, tools: Sequence[Tool]) -> Reader:
        parameters = {tool.name: tool.parameters for tool in tools}
        return Reader(lambda tape, output: self._parse(tape, output, parameters))

    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        style = self._style(marks)
        rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}", *style.rules]
        for index, tool in enumerate(tools):
            literals = LiteralRules(style, f"v{index}", tool)
            arguments = literals.arguments()
            opening = literal(f"{_CALL}{tool.name}{{")
            rules.append(f"call_{index}: {opening} {arguments} {literal('}')}")
            rules += literals.rules
        end = marks.term(self._end)
        joint = join(end, marks.term(self._start))
        return Form(trigger=self._start, call="call", joint=joint, tail=end, rules=rules)

    def _style(self, marks: Marks) -> Style:
        quote = marks.term(self._quote)
        rules = [f"marked: {quote} unmarked"]
        if marks.is_special(self._quote):
            rules.append(f"unmarked: {ANY_TEXT} {quote}")
        else:
            rules.append(f"unmarked[suffix={quote}]: {ANY_TEXT}")
        return Style(
            string="marked",
            any_key=r"/[A-Za-z_][A-Za-z0-9_\-]*:/",
            quote=lambda text: join(quote, literal(text), quote),
            key=lambda name: f"{name}:",
            argument=lambda name: f"{name}:",
            words={True: "true", False: "false", None: "null"},
            comma=",",
            rules=tuple(rules),
        )

    def _parse(
        self, tape: Tape, output: Output, tools: Mapping[str, Mapping[str, Any]]
    ) -> Steps[None]:
        starts = Markers(self._start)
        while (yield from tape.until(starts, output.text)):
            before = output.num_calls
            whole = yield from self._read_calls(tape, output, tools)
            if output.num_calls > before:
                yield from tape.leave_block(whole, self._end, self._start)

    def _read_calls(
        self, tape: Tape, output: Output, tools: Mapping[str, Mapping[str, Any]]
    ) -> Steps[bool]:
        """Read the calls of a block; whether they were whole."""
        before = output.num_calls
        while True:
            tape.keep()
            yield from tape.spaces()
            if not (yield from tape.accept(_CALL)):
                break
            name = yield from tape.word(_NAME)
            if not name or not (yield from tape.accept("{")):
                break
            tape.kept()
            output.start(name)
            if not (yield from self._read_arguments(tape, output, tools.get(name, {}))):
                return False
        if output.num_calls == before:
            output.text(self._start + tape.kept())
            return False
        return not tape.kept().strip()

    def _read_arguments(
        self, tape: Tape, output: Output, parameters: Mapping[str, Any]
    ) -> Steps[bool]:
        """Read the arguments of an open call and end it; False where they break off."""
        writer = ArgumentsWriter(output.arguments, parameters)
        whole = True
        while whole:
            yield from tape.spaces()
            if (yield from tape.accept("}")):
                writer.close()
                output.end()
                return True
            key = yield from read_key(tape, self._notation)
            yield from tape.spaces()
            if key is None or not (yield from tape.accept(":")):
                break
            yield from tape.spaces()
            types = writer.key(key)
            whole = yield from copy_argument(tape, output.arguments, self._notation, types)
            yield from tape.spaces()
            whole = whole and ((yield from tape.peek()) == "}" or (yield from tape.accept(",")))
        output.end(broken_off=tape.is_over)
        return False


def pipe_marked() -> BracedCalls:
    """The form with markers of bars: `<|tool_call>`, `<tool_call|>`, `<|"|>`."""
    return BracedCalls("gemma", ("<|tool_call>", "<tool_call|>", '<|"|>'), stop="<|tool_response>")


def escape_marked() -> BracedCalls:
    """The form with markers of words: `<start_function_call>`, `<escape>`."""
    return BracedCalls(
        "functiongemma",
        ("<start_function_call>", "<end_function_call>", "<escape>"),
        stop="<start_function_response>",
    )
