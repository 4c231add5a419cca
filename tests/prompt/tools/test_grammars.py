"""Every dialect's grammars, held against what it writes, by llguidance itself."""

import re
from collections.abc import Sequence

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.errors import InputError
from opsin.prompt.tools.dialect import Dialect, Tool
from opsin.prompt.tools.index import DIALECTS

from .samples import SAMPLES, TOOLS, read

every_dialect = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
with_and_without_special = pytest.mark.parametrize("with_special", [False, True])


class Bytes:
    """A tokenizer of single bytes, and of the texts given as special tokens."""

    eos_token_id = 256
    bos_token_id = None

    def __init__(self, special: Sequence[str] = ()) -> None:
        self.special = {text: 257 + index for index, text in enumerate(special)}
        texts = [text.encode() for text in ("<|end|>", *special)]
        self.tokens = [bytes([byte]) for byte in range(256)] + texts
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)

    def encode(self, text: str) -> list[int]:
        if not self.special:
            return list(text.encode())
        parts = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)
        pieces = [[self.special[p]] if p in self.special else list(p.encode()) for p in parts]
        return [token for piece in pieces for token in piece]


def accepts(grammar: str, text: str, special: Sequence[str] = ()) -> bool:
    """Whether a grammar takes the whole text and may end there."""
    tokenizer = Bytes(special)
    wrapped = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokenizer))
    matcher = llguidance.LLMatcher(wrapped, grammar)
    assert not matcher.is_error(), f"{matcher.get_error()}\n{grammar}"
    ids = tokenizer.encode(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def marks_of(dialect: Dialect, with_special: bool) -> tuple[str, ...]:
    return dialect.markers if with_special else ()


@every_dialect
@with_and_without_special
def test_calls_are_accepted_and_nothing_else(dialect: Dialect, with_special: bool) -> None:
    special = marks_of(dialect, with_special)
    grammar = dialect.grammar(TOOLS, True, Bytes(special).special)
    sample = SAMPLES[dialect.name]
    assert accepts(grammar, sample, special)
    for wrong in ("", "Hi. " + sample, sample + " done", sample[:-1] + "?"):
        assert not accepts(grammar, wrong, special)


@every_dialect
def test_only_the_tools_can_be_called(dialect: Dialect) -> None:
    sample = SAMPLES[dialect.name]
    assert not accepts(dialect.grammar(TOOLS, True), sample.replace("get_weather", "get_we"))
    assert not accepts(dialect.grammar(TOOLS[1:], True), sample)


@every_dialect
def test_arguments_are_held_to_the_schema(dialect: Dialect) -> None:
    grammar = dialect.grammar(TOOLS, True)
    sample = SAMPLES[dialect.name]
    # days, a key, a number in a list; and the unit, which stands behind its key.
    changes = [
        re.sub(r"(days\W+(?:arg_\w+\W+)*)3", r"\1true", sample, count=1),
        sample.replace("city", "town"),
        sample.replace("2.5", "{}"),
        re.sub(r"(unit\W+(?:(?:arg_\w+|escape)\W+)*)c", r"\1k", sample, count=1),
    ]
    for changed in changes:
        assert changed != sample
        assert not accepts(grammar, changed), changed


@every_dialect
def test_without_parallel_there_is_one_call(dialect: Dialect) -> None:
    grammar = dialect.grammar(TOOLS[1:], False)
    both = dialect.grammar(TOOLS, False)
    assert not accepts(both, SAMPLES[dialect.name])
    single = only_the_second(dialect)
    assert accepts(grammar, single)
    assert accepts(both, single)


def only_the_second(dialect: Dialect) -> str:
    """The sample's call of `now` alone, cut out by the grammar's own frame."""
    sample = SAMPLES[dialect.name]
    first = sample.index("get_weather")
    second = sample.rindex("now")
    # What stands in front of a name within a call stands in front of both.
    length = 0
    while length < first and sample[first - length - 1] == sample[second - length - 1]:
        length += 1
    return sample[: first - length] + sample[second - length :]


@every_dialect
@with_and_without_special
def test_a_lazy_grammar_takes_text_and_calls(dialect: Dialect, with_special: bool) -> None:
    special = marks_of(dialect, with_special)
    grammar = dialect.lazy_grammar(TOOLS, True, Bytes(special).special)
    if grammar is None:
        assert dialect.name in ("pythonic", "llama3_json")
        return
    sample = SAMPLES[dialect.name]
    assert accepts(grammar, "", special)
    assert accepts(grammar, "Hello <b>.\n", special)
    assert accepts(grammar, sample, special)
    assert accepts(grammar, "Let me see. " + sample, special)
    assert not accepts(grammar, sample.replace("get_weather", "get_we"), special)
    assert not accepts(grammar, sample[: sample.index("city")], special)


@every_dialect
def test_schemas_of_every_kind_compile(dialect: Dialect) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    properties = {
        "any": {},
        "anything": True,
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        "either": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "maybe": {"type": ["string", "null"]},
        "mixed": {"enum": ["a", 1, None, True, [1, "b"], {"k": "v"}]},
        "fixed": {"const": "x"},
        "map": {"type": "object", "additionalProperties": {"type": "number"}},
        "list": {"type": "array"},
        "tree": {"$ref": "#/$defs/node"},
        "flag": {"type": "boolean"},
        "none": {"type": "null"},
        "odd": {"type": "number", "minimum": 2, "x-unknown": 1},
    }
    schema = {"type": "object", "properties": properties, "$defs": {"node": node}}
    tools = (Tool("f", "", schema), Tool("g", "", {**schema, "required": ["flag", "tags"]}))
    for special in ({}, Bytes(dialect.markers).special):
        grammar = dialect.grammar(tools, True, special)
        assert not accepts(grammar, "no", tuple(special))


def test_optional_arguments_may_be_left_out() -> None:
    names = ("a", "b", "c")
    schema = {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in names},
        "required": ["b"],
    }
    grammar = DIALECTS["pythonic"].grammar((Tool("f", "", schema),), False)
    for right in ("[f(b=1)]", "[f(a=1, b=2)]", "[f(b=1, c=2)]", "[f(a=1, b=2, c=3)]"):
        assert accepts(grammar, right)
    for wrong in ("[f()]", "[f(a=1)]", "[f(b=1, a=2)]", "[f(, b=1)]", "[f(b=1,)]", "[f(c=1)]"):
        assert not accepts(grammar, wrong)
    every = DIALECTS["pythonic"].grammar((Tool("f", "", {**schema, "required": []}),), False)
    assert accepts(every, "[f()]")
    assert accepts(every, "[f(a=1, c=3)]")


def test_a_strict_tool_is_refused_where_its_schema_cannot_be_held() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "nonesuch"}}}
    lenient = DIALECTS["hermes"].grammar((Tool("f", "", schema),), False)
    assert accepts(lenient, '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>')
    strict = DIALECTS["hermes"].grammar((Tool("f", "", schema, strict=True),), False)
    wrapped = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    assert "format" in llguidance.LLMatcher(wrapped, strict).get_error()


KEYWORDS = (
    "type properties required items enum const anyOf oneOf allOf $ref $defs additionalProperties a"
)
SCHEMAS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-2, 2), st.sampled_from(("string", "#/a", "x"))
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(KEYWORDS.split()), inner, max_size=4),
    ),
    max_leaves=12,
)


@every_dialect
@settings(max_examples=40, deadline=None)
@given(parameters=st.dictionaries(st.sampled_from(("type", "properties", "required")), SCHEMAS))
def test_schemas_that_are_none_break_nothing(
    dialect: Dialect, parameters: dict[str, object]
) -> None:
    tools = (Tool("get_weather", "", parameters),)
    dialect.grammar(tools, True)
    dialect.lazy_grammar(tools, True)
    read(dialect, SAMPLES[dialect.name], tools=tools)


@every_dialect
def test_schemas_that_refer_to_themselves_a_thousandfold(dialect: Dialect) -> None:
    many = [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}, {"type": "null"}] * 10
    schema = {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/a"}},
        "$defs": {"a": {"anyOf": many}, "b": {"oneOf": many}},
    }
    tools = (Tool("get_weather", "", schema),)
    assert len(dialect.grammar(tools, True)) < 20_000
    read(dialect, SAMPLES[dialect.name], tools=tools)


@every_dialect
def test_a_schema_nested_too_deeply_is_refused(dialect: Dialect) -> None:
    schema: dict[str, object] = {}
    for _ in range(50_000):
        schema = {"items": schema}
    with pytest.raises(InputError, match="too deeply"):
        dialect.grammar((Tool("f", "", schema),), True)
