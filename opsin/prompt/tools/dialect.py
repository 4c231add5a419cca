"""What a tool-call dialect offers: a reader of calls, the grammar of calls, messages in its form.

A reader never refuses its input. Up to the name of a call, what does not have the dialect's form is
text, marker included. From the name on it is a call, whose arguments are given as far as they could
be read; what else stands in its block is dropped. White space around calls is no text.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from opsin.prompt.tools.grammars import Form, Marks, check_depth
from opsin.prompt.tools.history import prepared
from opsin.prompt.tools.tape import Steps, Tape


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text outside calls."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins; `index` counts the calls of an answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments; the pieces of a call add up to one JSON text."""

    index: int
    fragment: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is over; also comes, at the finish, for one that the text broke off in."""

    index: int


ToolEvent: TypeAlias = TextPiece | CallStart | CallArguments | CallEnd


class Output:
    """Collects a reader's events."""

    def __init__(self) -> None:
        self._events: list[ToolEvent] = []
        self._num_calls = 0
        self._is_open = False
        self._after_call = False
        self._has_arguments = False
        self._space: list[str] = []

    @property
    def num_calls(self) -> int:
        """How many calls have begun."""
        return self._num_calls

    def text(self, text: str) -> None:
        """Text outside calls; white space waits for what comes after it, and goes after a call."""
        if self._after_call:
            text = text.lstrip()
        kept = text.rstrip()
        if kept:
            self._add_text("".join(self._space) + kept)
            self._space.clear()
            self._after_call = False
        if len(kept) < len(text):
            self._space.append(text[len(kept) :])

    def start(self, name: str) -> None:
        """A call begins."""
        self.end()
        self._space.clear()
        self._is_open = True
        self._has_arguments = False
        self._events.append(CallStart(self._num_calls, name))
        self._num_calls += 1

    def arguments(self, fragment: str) -> None:
        """A piece of the open call's arguments."""
        if fragment:
            self._has_arguments = True
            self._events.append(CallArguments(self._num_calls - 1, fragment))

    def end(self, broken_off: bool = False) -> None:
        """The open call, if there is one, is over; without arguments it gets an empty object."""
        if not self._is_open:
            return
        if not self._has_arguments and not broken_off:
            self.arguments("{}")
        self._events.append(CallEnd(self._num_calls - 1))
        self._is_open = False
        self._after_call = True

    def finish(self) -> None:
        """At the end of the text: end the open call, give out white space that ends plain text."""
        self.end(broken_off=True)
        self._add_text("".join(self._space))
        self._space.clear()

    def take(self) -> list[ToolEvent]:
        """The events since the last time."""
        events = self._events
        self._events = []
        return events

    def _add_text(self, text: str) -> None:
        if text:
            self._events.append(TextPiece(text))


Parse: TypeAlias = Callable[[Tape, Output], Steps[None]]


class Reader:
    """Turns an answer's text, fed in pieces of any size, into events."""

    def __init__(self, parse: Parse) -> None:
        self._tape = Tape()
        self._output = Output()
        self._steps: Steps[None] | None = self._run(parse)

    def feed(self, text: str) -> list[ToolEvent]:
        """The events that this text completes or carries on."""
        self._tape.feed(text)
        return self._advance()

    def finish(self) -> list[ToolEvent]:
        """At the end of the text: what was held back, and the end of an open call."""
        if self._steps is not None:
            self._tape.end()
        return self._advance()

    def _run(self, parse: Parse) -> Steps[None]:
        yield from parse(self._tape, self._output)
        yield from self._tape.rest(self._output.text)
        self._output.finish()

    def _advance(self) -> list[ToolEvent]:
        if self._steps is not None:
            try:
                next(self._steps)
            except StopIteration:
                self._steps = None
        return self._output.take()


class Dialect(ABC):
    """One way of writing tool calls.

    `markers` are the texts of this dialect that may be special tokens of a tokenizer: they must
    reach the reader. `starts` are the texts that open a call. `stops` are those with which a model
    asks for the results of its calls: the answer ends there. `special` is, everywhere, the ids of
    those markers that are special tokens.
    """

    name: str
    markers: tuple[str, ...]
    starts: tuple[str, ...]
    stops: tuple[str, ...] = ()

    @abstractmethod
    def reader(self, tools: Sequence[Tool]) -> Reader:
        """A reader for one answer to a request with these tools."""

    @abstractmethod
    def form(self, tools: Sequence[Tool], marks: Marks) -> Form:
        """The form of calls of these tools, from which the grammars are made."""

    def grammar(
        self, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int] | None = None
    ) -> str:
        """A Lark grammar (llguidance's) of one call, or of one or more with `parallel`.

        Nothing else may be written, and the arguments are held to the tool's schema. What a schema
        says and no grammar can hold is let through, unless the tool is strict: then llguidance
        refuses the grammar. Raises InputError for schemas nested too deeply.
        """
        check_depth(tools)
        marks = Marks(special)
        return self.form(tools, marks).grammar(marks, parallel)

    def lazy_grammar(
        self, tools: Sequence[Tool], parallel: bool, special: Mapping[str, int] | None = None
    ) -> str | None:
        """A Lark grammar of free text in which a call, once opened, is held to its schema.

        None where nothing but its form tells a call from text.
        """
        check_depth(tools)
        marks = Marks(special)
        return self.form(tools, marks).lazy_grammar(marks, parallel)

    def prepare_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        template: str | None = None,
    ) -> list[dict[str, Any]]:
        """The conversation with earlier calls and results as this dialect's templates read them.

        `messages` and `tools` are in OpenAI's form, `template` is the text of the chat template.
        """
        return prepared(messages, template)
