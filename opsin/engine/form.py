"""What form a request's answers have: tools offered, a grammar to keep to, reasoning before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from opsin.engine.gate import Gate
from opsin.engine.grammar import Grammar, Guide, grammar_text
from opsin.engine.processor import Processor
from opsin.errors import InputError
from opsin.families.base import Prompt
from opsin.prompt.answer import AnswerReader
from opsin.prompt.api import tool_dialect
from opsin.prompt.stream import THINK, Tag, open_tag
from opsin.prompt.tools.dialect import Dialect, Tool
from opsin.types import Constraint, SamplingParams


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request says of the form of its answers.

    tool_choice is "auto", "none", "required", or "=" and a tool's name. Without `is_chat` text is
    carried on, and nothing in it is told apart.
    """

    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    constraint: Constraint | None = None
    is_chat: bool = True

    @property
    def has_grammar(self) -> bool:
        """Whether a grammar may have to be compiled."""
        return self.constraint is not None or bool(self.offered)

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model is told of."""
        return () if self.tool_choice == "none" else self.tools


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """A request's `Wanted` for one model: ready to guide its answers and to read them.

    keep: special tokens that are part of the text, since they stand around calls or reasoning.
    """

    processor: Processor
    wanted: Wanted
    dialect: Dialect | None
    grammar: Grammar | None
    tags: tuple[Tag, ...]
    keep: frozenset[int]

    @classmethod
    def of(
        cls, processor: Processor, wanted: Wanted, chat_template: str | None = None
    ) -> AnswerForm:
        """The form for a model; compiles its grammar, which may take seconds.

        Raises InputError for tools that the model cannot take, and for a grammar that is wrong.
        """
        dialect = dialect_of(processor, wanted, chat_template)
        tags = reasoning_tags(processor) if wanted.is_chat else ()
        grammar = None
        calls = _calls(processor, wanted, dialect) if dialect is not None else None
        # Where the answer must be a call, the call's schema is what counts.
        must_call = wanted.tool_choice not in ("auto", "none")
        constraint = None if must_call else wanted.constraint
        param = "tools" if constraint is None else constraint.param
        text = grammar_text(constraint, calls)
        if text is not None:
            grammar = _compiled(processor, text, param, calls)
        marks = [mark for tag in tags for mark in (tag.start, tag.end)]
        marks += dialect.markers if dialect is not None else ()
        keep = frozenset(special_marks(processor, marks).values())
        return cls(processor, wanted, dialect, grammar, tags, keep)

    def ending(self, sampling: SamplingParams) -> SamplingParams:
        """The parameters, with the tokens that ask for the results of calls as ends."""
        marks = self.dialect.stops if self.dialect is not None else ()
        ends = special_marks(self.processor, marks).values()
        return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *ends))

    def guide(self, prompt: Prompt) -> Guide | None:
        """What holds one answer to the grammar, if there is one."""
        if self.grammar is None:
            return None
        opened = open_tag(prompt.text, self.tags)
        tag = opened or next(iter(self.tags), None)
        if tag is None or (opened is None and not self._may_think(prompt, tag)):
            return self.grammar.guide()
        return self.grammar.guide(Gate(self.processor.tokenizer, tag, opened=opened is not None))

    def _may_think(self, prompt: Prompt, tag: Tag) -> bool:
        """Whether the model was trained to think first, and the prompt has not done it for it."""
        template = self.processor.chat_template
        sources = template.sources.values() if template is not None else ()
        speaks = any(tag.start in source or tag.end in source for source in sources)
        return speaks and not prompt.text.rstrip().endswith(tag.end)

    def reader(self, prompt: Prompt) -> AnswerReader:
        """What reads one answer."""
        calls = self.dialect.reader(self.wanted.offered) if self.dialect is not None else None
        opened = open_tag(prompt.text, self.tags)
        return AnswerReader(self.tags, opened, calls, one_block=self.grammar is not None)


def dialect_of(
    processor: Processor, wanted: Wanted, chat_template: str | None = None
) -> Dialect | None:
    """How the model writes calls of the tools it is offered, if any; InputError if it cannot."""
    if not wanted.offered:
        return None
    dialect = tool_dialect(processor, chat_template)
    if dialect is None or processor.family.bare_prompt:
        raise no_tools(processor)
    return dialect


def reasoning_tags(processor: Processor) -> tuple[Tag, ...]:
    """The tags around a model's reasoning, none where its vocabulary has no such tokens."""
    known = processor.tokenizer.token_to_id(THINK.start) is not None
    mentions = processor.chat_template is not None and any(
        THINK.start in source or THINK.end in source
        for source in processor.chat_template.sources.values()
    )
    return (THINK,) if known or mentions else ()


def special_marks(processor: Processor, marks: Sequence[str]) -> dict[str, int]:
    """Those of the marks that are special tokens, with their ids."""
    tokenizer = processor.tokenizer
    ids = {mark: tokenizer.token_to_id(mark) for mark in marks}
    return {m: i for m, i in ids.items() if i is not None and i in tokenizer.special_ids}


def template_tool(tool: Tool) -> dict[str, Any]:
    """A tool in OpenAI's form, with all its parts."""
    parameters: Mapping[str, Any] = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": dict(parameters)}
    return {"type": "function", "function": function}


def no_tools(processor: Processor) -> InputError:
    """The error for tools that are given to a model that cannot take them."""
    template = processor.chat_template
    mentions = template is not None and template.mentions("tools")
    why = "its chat template has no place for them"
    if mentions:
        why = "its chat template writes calls in a form that is not known here"
    return InputError(
        "This model takes no tools",
        why=why,
        remedy="Choose a model that was trained to call tools, or give the template that it was "
        "trained with by --chat-template",
        param="tools",
    )


def _compiled(processor: Processor, text: str, param: str, calls: str | None) -> Grammar:
    """The grammar; where it is wrong because of the tools, the error names these."""
    try:
        return processor.grammars.compile(text, param)
    except InputError:
        if calls is not None and calls != text:
            processor.grammars.compile(calls, "tools")
        raise


def _calls(processor: Processor, wanted: Wanted, dialect: Dialect) -> str | None:
    """The grammar (Lark) that calls are held to, if they are."""
    special = special_marks(processor, dialect.markers)
    tools, parallel = wanted.offered, wanted.parallel_tool_calls
    if wanted.tool_choice == "required":
        return dialect.grammar(tools, parallel, special)
    if wanted.tool_choice.startswith("="):
        named = [tool for tool in tools if tool.name == wanted.tool_choice[1:]]
        return dialect.grammar(named, False, special)
    if wanted.constraint is not None:
        return dialect.grammar(tools, parallel, special)
    if parallel and not any(tool.strict for tool in tools):
        return None
    return dialect.lazy_grammar(tools, parallel, special)
