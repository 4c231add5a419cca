"""What single dialects make of text that is not quite, or not at all, in their form."""

import json

import pytest

from opsin.prompt.tools.dialect import CallArguments, CallStart, TextPiece, Tool, ToolEvent
from opsin.prompt.tools.index import DIALECTS

from .samples import call, read, wide

TOOLS = (
    Tool(
        "f",
        "",
        {
            "type": "object",
            "properties": {
                "s": {"type": "string"},
                "i": {"type": "integer"},
                "n": {"type": "number"},
                "b": {"type": "boolean"},
                "o": {"type": "object"},
                "m": {"type": ["string", "null"]},
                "e": {"$ref": "#/$defs/e"},
            },
            "$defs": {"e": {"enum": ["x", 1]}},
        },
    ),
    Tool("g"),
)


def events(name: str, text: str) -> list[ToolEvent]:
    """A dialect's events, which are the same however the text comes."""
    found = read(DIALECTS[name], text, tools=TOOLS)
    assert found == read(DIALECTS[name], text, [1] * len(text), tools=TOOLS)
    return found


def arguments(name: str, text: str) -> dict[str, object]:
    """The arguments of the one call of a text."""
    found = events(name, text)
    assert [event for event in found if isinstance(event, CallStart)] == [CallStart(0, "f")]
    return json.loads("".join(e.fragment for e in found if isinstance(e, CallArguments)))


def test_arguments_may_come_before_the_name_or_as_text_or_not_at_all() -> None:
    for body in (
        '{"arguments": {"i": 1}, "name": "f"}',
        '{"id": 7, "name": "f", "parameters": {"i": 1}, "more": [{}]}',
        '{"name": "f", "arguments": "{\\"i\\": 1}"}',
        '[{"name": "f", "arguments": {"i": 1}}]',
    ):
        assert arguments("hermes", f"<tool_call>{body}</tool_call>") == {"i": 1}
    for body in (
        '{"name": "f"}',
        '{"name": "f", "arguments": null}',
        '{"name": "f", "arguments":""}',
    ):
        assert events("hermes", f"<tool_call>{body}</tool_call>") == call(0, "f", "{}")


def test_several_calls_in_one_block() -> None:
    text = '<tool_call>\n{"name": "f"}\n{"name": "g"}\n</tool_call> done'
    assert events("hermes", text) == [*call(0, "f", "{}"), *call(1, "g", "{}"), TextPiece("done")]


def test_control_characters_in_a_string_are_escaped() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"s": "a\n\tb\\n\\u00e9"}}</tool_call>'
    assert arguments("hermes", text) == {"s": "a\n\tb\né"}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>no object</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        '<tool_call>{"name": ""}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>[]</tool_call>",
        "<tool_call>",
        "a </tool_call> b",
    ],
)
def test_a_block_without_a_name_is_text(text: str) -> None:
    assert events("hermes", text) == [TextPiece(text)]


def test_a_call_after_a_block_that_was_none() -> None:
    text = '<tool_call>oh<tool_call>{"name": "g"}</tool_call>'
    assert events("hermes", text) == [TextPiece("<tool_call>oh"), *call(0, "g", "{}")]


def test_what_breaks_off_in_a_block_is_dropped_to_its_end() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"i": 1,<oops>}}</tool_call>then'
    assert events("hermes", text) == [*call(0, "f", '{"i": 1,'), TextPiece("then")]
    again = '<tool_call>{"name": "f", "arguments": {]<tool_call>{"name": "g"}</tool_call>'
    assert events("hermes", again) == [*call(0, "f", "{"), *call(1, "g", "{}")]


def test_brackets_too_many_and_a_missing_end_are_forgiven() -> None:
    assert events("hermes", '<tool_call>{"name": "g"}}}</tool_call>') == call(0, "g", "{}")
    text = '<tool_call>{"name": "g"}\nNow wait'
    assert events("hermes", text) == [*call(0, "g", "{}"), TextPiece("Now wait")]


def test_tagged_values_follow_the_schema() -> None:
    values = {
        "s": "\n12\n\n",
        "i": "\n 12 \n",
        "n": "\n1.5\n",
        "b": "\nTrue\n",
        "o": '\n{"k": [1]}\n',
        "m": "\nnull\n",
        "e": "\nx\n",
        "unknown": "\n[1, 2]\n",
        "text": "\nplain\n",
    }
    body = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in values.items())
    assert arguments(
        "qwen3_coder", f"<tool_call>\n<function=f>\n{body}</function>\n</tool_call>"
    ) == {
        "s": "12\n",
        "i": 12,
        "n": 1.5,
        "b": True,
        "o": {"k": [1]},
        "m": None,
        "e": "x",
        "unknown": [1, 2],
        "text": "plain",
    }


def test_a_value_that_is_none_of_its_types_stays_a_string() -> None:
    text = "<tool_call>f\n<arg_key>i</arg_key><arg_value>many</arg_value></tool_call>"
    assert arguments("glm45", text) == {"i": "many"}
    whole = "<tool_call>f\n<arg_key>i</arg_key><arg_value>3.0</arg_value></tool_call>"
    assert arguments("glm45", whole) == {"i": 3}


def test_tags_that_are_missing() -> None:
    text = "<function=f>\n<parameter=i>\n1\n<parameter=s>\na<b\n</function>\n</tool_call>"
    assert arguments("qwen3_coder", text) == {"i": 1, "s": "a<b"}
    assert events("qwen3_coder", "<tool_call>hello</tool_call>") == [
        TextPiece("<tool_call>hello</tool_call>")
    ]
    assert arguments("glm45", "<tool_call>f<arg_key>s</arg_key><arg_value>a</tool_call>") == {
        "s": "a"
    }


def test_bare_json_is_a_call_only_with_a_tools_name() -> None:
    name = "llama3_json"
    assert events(name, ' {"name": "g", "parameters": {}}') == call(0, "g", "{}")
    for text in (
        '{"name": "other", "parameters": {}}',
        '{"title": "g", "name": "g"}',
        'Here: {"name": "g", "parameters": {}}',
        "{}",
    ):
        assert events(name, text) == [TextPiece(text)]


def test_a_marker_makes_bare_json_a_call() -> None:
    for before, after in (("<|python_tag|>", ""), ("<|python_start|>", "<|python_end|>")):
        text = f'Well. {before}{{"type": "function", "name": "x", "parameters": {{}}}}{after}'
        assert events("llama3_json", text) == [TextPiece("Well."), *call(0, "x", "{}")]


def test_python_values() -> None:
    text = (
        "[f(s='it\\'s \\x41\\u00e9\\ud83d\\ude00\\q', i=-1, n=.5, b=False, m=None, "
        'o={\'a\': (1, 2,), "b": [], 3: \'x\',}, e="""two\n"lines\\"""")]'
    )
    assert arguments("pythonic", text) == {
        "s": "it's Aé\U0001f600\\q",
        "i": -1,
        "n": 0.5,
        "b": False,
        "m": None,
        "o": {"a": [1, 2], "b": [], "3": "x"},
        "e": 'two\n"lines"',
    }


def test_python_arguments_without_names_or_of_another_type() -> None:
    assert arguments("pythonic", '[f("a", 2, n="1.5", s2=word)]') == {
        "s": "a",
        "i": 2,
        "n": 1.5,
        "s2": "word",
    }
    assert arguments("pythonic", "[f(s=12)]") == {"s": "12"}


def test_a_python_list_is_a_call_only_with_a_tools_name() -> None:
    for text in ("[1, 2]", "[other(a=1)]", "see [g()]", "[g]", "[]"):
        assert events("pythonic", text) == [TextPiece(text)]
    text = "First:\n[g()] done"
    assert events("pythonic", text) == [
        TextPiece("First:"),
        *call(0, "g", "{}"),
        TextPiece("done"),
    ]
    assert events("pythonic", "<|python_start|>[g()]<|python_end|>") == call(0, "g", "{}")


def test_a_python_call_that_breaks_off() -> None:
    found = events("pythonic", "[f(i=1, s=oh no)]\nnext")
    assert found == [*call(0, "f", '{"i": 1, "s": "oh"'), TextPiece("next")]


def test_a_code_block_without_calls_is_text() -> None:
    text = "```tool_code\nimport this\n``` so"
    assert events("tool_code", text) == [TextPiece(text)]


def test_every_form_of_the_marked_list_is_read() -> None:
    for text in (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"i": 1}, "id": "abcdefghi"}]',
        '[TOOL_CALLS]f[ARGS]{"i": 1}',
        '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"i": 1}',
        '[TOOL_CALLS]f{"i": 1}',
        '[TOOL_CALLS]{"name": "f", "arguments": {"i": 1}}',
    ):
        for name in ("mistral", "mistral_args", "mistral_call_id"):
            assert arguments(name, text) == {"i": 1}
    assert events("mistral", "[TOOL_CALLS]no call") == [TextPiece("[TOOL_CALLS]no call")]


def test_braced_values() -> None:
    text = (
        '<|tool_call>call:f{s:<|"|>a "b", {c}\\n<|"|>,i:<|"|>3<|"|>,b:true,m:null,'
        'o:{k:[<|"|>x<|"|>,1],"q r":two words},unknown:12:30}<tool_call|>'
    )
    assert arguments("gemma", text) == {
        "s": 'a "b", {c}\\n',
        "i": 3,
        "b": True,
        "m": None,
        "o": {"k": ["x", 1], "q r": "two words"},
        "unknown": "12:30",
    }


def test_braced_calls_that_break_off() -> None:
    found = events("gemma", "<|tool_call>call:f{i:1,s}<tool_call|>and")
    assert found == [*call(0, "f", '{"i": 1'), TextPiece("and")]
    text = "<|tool_call>hello<tool_call|>"
    assert events("gemma", text) == [TextPiece(text)]


def test_both_forms_around_a_separator_are_read() -> None:
    inner = ('function<|tool▁sep|>f\n```json\n{"i": 1}\n```', 'f<|tool▁sep|>{"i": 1}')
    for body in inner:
        text = wide(f"<|tool▁calls▁begin|><|tool▁call▁begin|>{body}<|tool▁call▁end|>")
        for name in ("deepseek_v3", "deepseek_v31"):
            assert arguments(name, text + wide("<|tool▁calls▁end|>")) == {"i": 1}
            assert arguments(name, text) == {"i": 1}
    text = wide("<|tool▁calls▁begin|>nothing<|tool▁calls▁end|>")
    assert events("deepseek_v3", text) == [TextPiece(text)]


def test_either_marker_opens_the_list_without_an_end() -> None:
    body = '[{"name": "f", "arguments": {"i": 1}}]'
    assert arguments("granite", f"<|tool_call|>{body}") == {"i": 1}
    assert arguments("granite", f"<tool_call>{body}") == {"i": 1}


def test_a_word_opens_calls_of_the_tools_only() -> None:
    for text in ("import functools\n", 'functools[{"name": "other"}]', "functools[0]"):
        assert events("functools", text) == [TextPiece(text)]
