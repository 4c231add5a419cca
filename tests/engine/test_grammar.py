"""Answers held to grammars: valid under any weights and sampling, and the same in a batch."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import opsin
from opsin.engine.gate import Gate
from opsin.engine.grammar import (
    Grammar,
    GrammarLimits,
    Grammars,
    GrammarTooComplex,
    Guide,
    grammar_text,
)
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.sampler import Sampler
from opsin.errors import InputError
from opsin.prompt.json_schema import enforceable
from opsin.prompt.stream import THINK
from opsin.prompt.tokenizer import Tokenizer
from opsin.prompt.vocabulary import Vocabulary
from opsin.types import Constraint, Event, SamplingParams

from ..families.tiny_tokenizer import byte_level, sentencepiece_like
from .test_loop import Inbox

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "colours": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "count", "colours"],
    "additionalProperties": False,
}
FORMS = {
    "schema": Constraint("json_schema", SCHEMA),
    "regex": Constraint("regex", "[0-9]{3}-[a-z]{2,9}"),
    "choice": Constraint("choice", ("yes", "no", 'né "x"\n')),
    "grammar": Constraint("grammar", 'start: "a" ("," /[0-9]{1,2}/){2,5} ";"'),
}
HOT = SamplingParams(max_tokens=400, temperature=1.5, seed=1)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return opsin.load("bundled", device="cpu")


@pytest.fixture(scope="module")
def engine(loaded: tuple[Any, Any]) -> Iterator[Engine]:
    with Engine(*loaded, EngineLimits(max_num_seqs=16, memory=1 << 26)) as engine:
        yield engine
        engine.scheduler.pool.forget()
        engine.scheduler.check_integrity()


def compiled(engine: Engine, form: Constraint) -> Grammar:
    assert engine.processor is not None
    text = grammar_text(form, None)
    assert text is not None
    return engine.processor.grammars.compile(text, form.param)


def is_valid(kind: str, text: str) -> bool:
    if kind == "regex":
        return re.fullmatch("[0-9]{3}-[a-z]{2,9}", text) is not None
    if kind == "choice":
        return text in FORMS["choice"].value
    if kind == "grammar":
        return re.fullmatch("a(,[0-9]{1,2}){2,5};", text) is not None
    held = json.loads(text)
    colours = set(held["colours"]) <= {"red", "blue"} and len(held["colours"]) <= 3
    return set(held) == set(SCHEMA["required"]) and 0 <= held["count"] <= 99 and colours


def ask(
    engine: Engine, sampling: SamplingParams, kind: str | None, text: str = "What?"
) -> list[Event]:
    assert engine.processor is not None
    guide = None if kind is None else compiled(engine, FORMS[kind]).guide()
    prompt = engine.processor.prepare(text)
    return list(engine.stream(prompt, sampling, guide=guide))


def said(events: list[Event]) -> str:
    return "".join(event.text for event in events)


@pytest.mark.parametrize("kind", FORMS)
def test_a_form_is_kept_at_any_temperature(engine: Engine, kind: str) -> None:
    for sampling in (
        SamplingParams(max_tokens=400),
        *(SamplingParams(max_tokens=400, temperature=1.5, seed=seed) for seed in range(4)),
    ):
        events = ask(engine, sampling, kind)
        assert events[-1].finish_reason == "stop"
        assert is_valid(kind, said(events))


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.5, "frequency_penalty": 2.0, "presence_penalty": 1.0},
        {"logit_bias": dict.fromkeys(range(468), -100.0)},
        {"no_repeat_ngram_size": 1},
        {"top_k": 1, "temperature": 0.7},
        {"min_p": 0.9, "temperature": 2.0, "seed": 3},
        {"ignore_eos": True},
        {"logprobs": 5},
    ],
)
def test_a_form_is_kept_beside_everything_else(engine: Engine, fields: dict[str, Any]) -> None:
    for kind in FORMS:
        events = ask(engine, SamplingParams(max_tokens=400, **fields), kind)
        assert is_valid(kind, said(events))
        assert events[-1].finish_reason == "stop"


def test_a_stop_string_still_ends_an_answer(engine: Engine) -> None:
    events = ask(engine, SamplingParams(max_tokens=400, stop=("-",)), "regex")
    assert re.fullmatch("[0-9]{3}", said(events))
    assert events[-1].stop_string == "-"


def test_a_batch_of_grammars_gives_what_each_gives_alone(engine: Engine) -> None:
    kinds = [*FORMS, None] * 3
    wanted = [
        (kind, f"Question {i}", [SamplingParams(max_tokens=60), HOT][i % 2])
        for i, kind in enumerate(kinds)
    ]
    alone = [said(ask(engine, sampling, kind, text)) for kind, text, sampling in wanted]
    inboxes = []
    for kind, text, sampling in wanted:
        assert engine.processor is not None
        inbox = Inbox()
        guide = None if kind is None else compiled(engine, FORMS[kind]).guide()
        engine.submit(engine.processor.prepare(text), sampling, inbox, guide=guide)
        inboxes.append(inbox)
    for inbox in inboxes:
        inbox.reason()
    assert [said(inbox.events) for inbox in inboxes] == alone


def test_a_slow_grammar_holds_up_no_other_request(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.processor is not None
    alone = said(ask(engine, HOT, "schema"))
    go_on = threading.Event()
    compute = Guide.compute

    def slow(self: Guide) -> None:
        go_on.wait(60)
        compute(self)

    monkeypatch.setattr(Guide, "compute", slow)
    held, free = Inbox(), Inbox()
    guide = compiled(engine, FORMS["schema"]).guide()
    engine.submit(engine.processor.prepare("What?"), HOT, held, guide=guide)
    engine.submit(engine.processor.prepare("What?"), SamplingParams(max_tokens=30), free)
    assert free.reason() in ("stop", "length")
    assert not held.done.is_set()
    go_on.set()
    assert held.reason() == "stop"
    assert said(held.events) == alone


def test_a_held_request_can_be_cancelled(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.processor is not None
    go_on = threading.Event()
    monkeypatch.setattr(Guide, "compute", lambda self: go_on.wait(60))
    inbox = Inbox()
    guide = compiled(engine, FORMS["schema"]).guide()
    request = engine.submit(engine.processor.prepare("What?"), HOT, inbox, guide=guide)
    assert inbox.first.wait(60)
    engine.cancel(request)
    assert inbox.reason() == "cancelled"
    go_on.set()


def test_a_grammar_that_grows_too_complex_ends_its_own_request_only(engine: Engine) -> None:
    assert engine.processor is not None
    form = Constraint("grammar", 'start: a\na: a a a | a a | "y" | /[a-z]/', "grammar")
    inbox, other = Inbox(), Inbox()
    ends = dict.fromkeys(engine.processor.eos_token_ids, -100.0)
    sampling = SamplingParams(max_tokens=2000, logit_bias=ends)
    prompt = engine.processor.prepare("What?")
    engine.submit(prompt, sampling, inbox, guide=compiled(engine, form).guide())
    engine.submit(prompt, SamplingParams(max_tokens=5, ignore_eos=True), other)
    assert inbox.reason() == "error"
    assert isinstance(inbox.events[-1].error, GrammarTooComplex)
    assert "grammar" in str(inbox.events[-1].error)
    assert other.reason() == "length"


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (Constraint("regex", "[", "regex"), "unclosed character class"),
        (Constraint("regex", "(?=a)b", "regex"), "look-around"),
        (Constraint("json_schema", {"type": "nothing"}), "Invalid type: nothing"),
        (Constraint("json_schema", {"not": {}}), 'Unimplemented keys: ["not"]'),
        (Constraint("json_schema", {"minimum": 3, "maximum": 2, "type": "integer"}), ""),
        (Constraint("json_schema", [1]), "not a JSON schema"),
        (Constraint("grammar", "start: x", "grammar"), 'unknown name: "x"'),
        (Constraint("grammar", "", "grammar"), "not a text"),
        (Constraint("choice", (), "choice"), "not a list of texts"),
    ],
)
def test_a_wrong_form_is_refused_with_the_reason(
    engine: Engine, form: Constraint, why: str
) -> None:
    with pytest.raises(InputError) as caught:
        compiled(engine, form)
    assert why in str(caught.value)
    assert form.param in str(caught.value)
    assert "| start" not in str(caught.value)


SPACED = {
    "natural": '{"a": "x y", "b": [1, 2]}',
    "compact": '{"a":"x y","b":[1,2]}',
    "padded": '{ "a" : "x y", "b": [1, 2] }',
    "wide": '{"a":  "x y", "b": [1, 2]}',
    "lines": '{\n  "a": "x y",\n  "b": [1, 2]\n}',
    "trailing": '{"a": "x y", "b": [1, 2]\n    }',
}


@pytest.mark.parametrize(
    ("own", "taken"), [({}, {"natural", "compact"}), ({"whitespace_flexible": True}, set(SPACED))]
)
def test_json_stands_in_one_line_unless_its_schema_says_otherwise(
    loaded: tuple[Any, Any], own: dict[str, Any], taken: set[str]
) -> None:
    properties = {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "integer"}}}
    schema = {"type": "object", "properties": properties, "required": ["a", "b"], "x-guidance": own}
    text = grammar_text(Constraint("json_schema", schema), None)
    assert text is not None
    matcher = loaded[1].grammars.compile(text, "schema").matcher
    for name, answer in SPACED.items():
        tokens, copy = loaded[1].tokenizer.encode(answer), matcher.deep_copy()
        fits = copy.try_consume_tokens(tokens) == len(tokens) and copy.is_accepting()
        assert fits == (name in taken), name


def test_a_format_that_is_no_form_is_only_a_remark(engine: Engine) -> None:
    held = {"type": "string", "format": "file-path", "maxLength": 3}
    schema = {"properties": {"format": held, "day": {"type": "string", "format": "date"}}}
    assert compiled(engine, Constraint("json_schema", schema))


@pytest.mark.parametrize("deep", ["rules", "terminals", "references"])
def test_a_deep_grammar_does_not_overflow_the_stack(engine: Engine, deep: str) -> None:
    many = range(6000)  # without a deep stack, 2500 end the process
    if deep == "references":
        names: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in many}
        names["a6000"] = {"type": "string"}
        form = Constraint("json_schema", {"$ref": "#/$defs/a0", "$defs": names})
    else:
        letter = "a" if deep == "rules" else "A"
        lines = [f'{letter}{i}: "x" {letter}{i + 1}' for i in many]
        text = "\n".join([f"start: {letter}0", *lines, f'{letter}{len(many)}: "y"'])
        form = Constraint("grammar", text, "grammar")
    assert allowed(compiled(engine, form).guide(), 468)


def test_compiling_is_bounded_in_size_and_time(loaded: tuple[Any, Any]) -> None:
    tokenizer, ends = loaded[1].tokenizer, loaded[1].eos_token_ids
    small = Grammars(tokenizer, ends, GrammarLimits(chars=20))
    with pytest.raises(InputError, match="too large"):
        small.compile('start: "a long enough text"', "grammar")
    hasty = Grammars(tokenizer, ends, GrammarLimits(seconds=0.0))
    lines = [f'a{i}: "x" a{i + 1}' for i in range(5000)]
    with pytest.raises(GrammarTooComplex, match="seconds"):
        hasty.compile("\n".join(["start: a0", *lines, 'a5000: "y"']), "grammar")


def test_a_grammar_is_compiled_once(engine: Engine) -> None:
    assert compiled(engine, FORMS["regex"]) is compiled(engine, FORMS["regex"])


def test_only_special_tokens_are_special_in_a_grammar() -> None:
    marks = ("<|end|>", "<tool_call>", "[X]")
    tokenizer = Tokenizer(byte_level(marks, plain=marks[1:]))
    end = tokenizer.require_id("<|end|>")
    grammars = Grammars(tokenizer, [end])
    grammar = grammars.compile('start: "<tool_call>[X]<|end|>!"', "grammar")
    logits = torch.zeros(tokenizer.vocab_size)
    sampler = Sampler.of(SamplingParams(), guide=grammar.guide())
    tokens: list[int] = []
    while not tokens or not sampler.accept(tokens[-1]):
        tokens.append(sampler.sample(logits.clone(), tokens, 0)[0])
    assert tokens[:2] == [tokenizer.require_id(mark) for mark in marks[1:]]
    assert end not in tokens
    assert tokenizer.decode(tokens) == "<tool_call>[X]<|end|>!"


@pytest.mark.parametrize("backend", [byte_level(("<|end|>",)), sentencepiece_like()])
@pytest.mark.parametrize("text", ["hello", " hello", "the picture é图", "\n\n  x", "", "▁ a"])
def test_a_vocabulary_writes_texts_as_tokens(backend: Any, text: str) -> None:
    vocabulary = Vocabulary(Tokenizer(backend), 0)
    joined = b"".join(vocabulary.tokens[token] for token in vocabulary(text))
    assert joined == text.encode()


def thinker() -> tuple[Tokenizer, Grammars]:
    marks = ("<|end|>", "<think>", "</think>")
    tokenizer = Tokenizer(byte_level(marks, plain=marks[1:]))
    return tokenizer, Grammars(tokenizer, [tokenizer.require_id("<|end|>")])


def allowed(guide: Guide, size: int) -> set[int]:
    logits = torch.zeros(size)
    masked = guide.mask(logits, logits)
    return set(masked.isfinite().nonzero().flatten().tolist())


def test_a_grammar_starts_behind_the_reasoning() -> None:
    tokenizer, grammars = thinker()
    size = tokenizer.vocab_size
    guide = grammars.compile('start: "yes"', "grammar").guide(Gate(tokenizer, THINK, opened=True))
    end, line = tokenizer.require_id("<|end|>"), tokenizer.encode("\n")[0]
    assert allowed(guide, size) == set(range(size)) - {end}
    for token in tokenizer.encode("so: no"):
        assert not guide.advance(token)
    assert not guide.advance(tokenizer.require_id("</think>"))
    after = allowed(guide, size)
    assert line in after
    assert end not in after
    assert after - {line} <= {tokenizer.encode("y")[0], tokenizer.encode("yes")[0]}
    assert not guide.advance(line)
    assert line not in allowed(guide, size)
    assert [guide.advance(token) for token in tokenizer.encode("yes")][-1]


def test_a_model_may_think_first_or_not_at_all() -> None:
    tokenizer, grammars = thinker()
    size, start = tokenizer.vocab_size, tokenizer.require_id("<think>")
    grammar = grammars.compile('start: "yes"', "grammar")
    straight = grammar.guide(Gate(tokenizer, THINK, opened=False))
    assert start in allowed(straight, size)
    assert [straight.advance(token) for token in tokenizer.encode("yes")][-1]
    thinks = grammar.guide(Gate(tokenizer, THINK, opened=False))
    assert not thinks.advance(start)
    assert len(allowed(thinks, size)) == size - 1
    for token in [*tokenizer.encode("hm</think>"), tokenizer.encode("yes")[0]]:
        thinks.advance(token)
    assert start not in allowed(thinks, size)


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({"properties": {"a": {"type": "object", "properties": {}}}}, 2),
        ({"properties": {"a": {}}, "additionalProperties": True}, 0),
        ({"properties": {"properties": {"type": "string"}}}, 1),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"b": {}}}}}, 1),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, 0),
        ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}, 0),
        ({"const": {"properties": {"a": {}}}}, 0),
    ],
)
def test_objects_are_closed_where_nothing_else_adds_to_them(schema: Any, closed: int) -> None:
    text = json.dumps(enforceable(schema, "x"))
    assert text.count('"additionalProperties": false') == closed
