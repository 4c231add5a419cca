"""Earlier calls and results as chat templates read them, and which dialect a template speaks."""

import json
from typing import Any

import pytest

from opsin.errors import InputError
from opsin.prompt.template import ChatTemplate
from opsin.prompt.tools.history import short_id, takes_argument_text
from opsin.prompt.tools.index import DIALECTS, dialect_for, dialect_named

from .samples import SAMPLES, wide

OPENAI_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "does f", "parameters": {"type": "object"}},
}


def conversation() -> list[dict[str, Any]]:
    function = {"name": "f", "arguments": '{"a": 1}'}
    return [
        {"role": "user", "content": "Go"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_abc", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_abc", "content": "done"},
    ]


def test_arguments_become_objects_and_results_say_whose_they_are() -> None:
    given = conversation()
    found = DIALECTS["hermes"].prepare_messages(given)
    assert found[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert found[2]["name"] == "f"
    assert given == conversation()


def test_arguments_stay_text_where_the_template_writes_them_down() -> None:
    as_text = "{{ '<sep>' + tool['function']['arguments'] + '<end>' }}"
    found = DIALECTS["deepseek_v31"].prepare_messages(conversation(), (), as_text)
    assert found[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    back = DIALECTS["deepseek_v31"].prepare_messages(
        DIALECTS["hermes"].prepare_messages(conversation()), (), as_text
    )
    assert json.loads(back[1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1}


@pytest.mark.parametrize(
    ("template", "as_text"),
    [
        ("{{ call.function.arguments }}", True),
        ("{{- '\\n' + tool['function']['arguments'] + '\\n' }}", True),
        ("{{ tool_call.arguments | tojson }}", False),
        ("{{ '[ARGS]' + tool['function']['arguments']|tojson }}", False),
        ("{%- for key, value in call.arguments|items %}", False),
        ("{%- for k, v in call.arguments.items() %}", False),
        ("{%- for param in tool_call.arguments %}", False),
        ("{% if arguments is string %}{{ arguments }}{% endif %}", False),
        ("nothing", False),
    ],
)
def test_what_a_template_takes(template: str, as_text: bool) -> None:
    assert takes_argument_text(template) is as_text


def test_arguments_that_are_no_object_are_left_alone() -> None:
    chat = conversation()
    for text in ("[1]", "{", '{"a": NaN}', "[" * 100_000):
        chat[1]["tool_calls"][0]["function"]["arguments"] = text
        found = DIALECTS["hermes"].prepare_messages(chat)
        assert found[1]["tool_calls"][0]["function"]["arguments"] == text
    for odd in (None, "x", [1], [{"id": 1}], [{"function": "f"}]):
        chat[1]["tool_calls"] = odd
        for dialect in DIALECTS.values():
            assert len(dialect.prepare_messages(chat)) == 3


def test_ids_have_nine_letters_and_digits_where_they_must() -> None:
    found = DIALECTS["mistral"].prepare_messages(conversation())
    call_id = found[1]["tool_calls"][0]["id"]
    assert len(call_id) == 9
    assert call_id.isalnum()
    assert found[2]["tool_call_id"] == call_id
    assert short_id("abcDEF123") == "abcDEF123"
    assert len({short_id(f"call_{index}") for index in range(1000)}) == 1000


SYSTEM_TOOLS = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_tools_and_calls_become_text_where_the_template_knows_neither() -> None:
    dialect = dialect_for(SYSTEM_TOOLS)
    assert dialect is DIALECTS["phi4_mini"]
    chat = dialect.prepare_messages(conversation(), [OPENAI_TOOL], SYSTEM_TOOLS)
    text = ChatTemplate.from_text(SYSTEM_TOOLS).render(chat)
    assert text == (
        "<|system|>You are a helpful assistant with some tools.<|tool|>"
        + json.dumps([OPENAI_TOOL["function"]])
        + "<|/tool|><|end|><|user|>Go<|end|>"
        '<|assistant|><|tool_call|>[{"name": "f", "arguments": {"a": 1}}]<|/tool_call|><|end|>'
        "<|tool_response|>done<|end|><|assistant|>"
    )
    own = [{"role": "system", "content": "Be brief."}, *conversation()]
    chat = dialect.prepare_messages(own, [OPENAI_TOOL], SYSTEM_TOOLS)
    assert chat[0]["content"] == "Be brief."
    assert "does f" in chat[0]["tools"]
    assert "tools" not in dialect.prepare_messages(own, (), SYSTEM_TOOLS)[0]


def test_calls_become_text_where_the_template_writes_messages_only() -> None:
    template = "{% for message in messages %}{{ message['role'] + message['content'] }}{% endfor %}"
    found = DIALECTS["granite"].prepare_messages(conversation(), (), template)
    assert found[1] == {
        "role": "assistant",
        "content": '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]',
    }
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "Well. "}]}]
    parts[0]["tool_calls"] = conversation()[1]["tool_calls"]
    content = DIALECTS["granite"].prepare_messages(parts, (), template)[0]["content"]
    assert [part["text"][:5] for part in content] == ["Well.", "<|too"]


def test_calls_made_together_are_told_one_by_one_where_they_must() -> None:
    single = "{{ raise_exception('This model only supports single tool-calls at once!') }}"
    calls = [
        {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        for name in "abc"
    ]
    chat = [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": "Yes", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_b", "content": "B"},
        {"role": "tool", "tool_call_id": "call_a", "content": "A"},
        {"role": "tool", "tool_call_id": "call_x", "content": "X"},
        {"role": "assistant", "content": "Done"},
    ]
    dialect = DIALECTS["llama3_json"]
    assert len(dialect.prepare_messages(chat)) == len(chat)
    found = dialect.prepare_messages(chat, (), single)
    told = [
        (message["content"], [call["id"] for call in message.get("tool_calls", ())])
        for message in found
    ]
    assert told == [
        ("Go", []),
        ("Yes", ["call_a"]),
        ("A", []),
        ("", ["call_b"]),
        ("B", []),
        ("", ["call_c"]),
        ("X", []),
        ("Done", []),
    ]


# What each published template says of tools, cut down to that.
PHRASES = {
    "hermes": "within <tool_call></tool_call> XML tags: <tool_call>\n{",
    "qwen3_coder": "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>",
    "glm45": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
    "llama3_json": 'Respond in the format {"name": function name, "parameters": dictionary of',
    "pythonic": "[func_name1(param1=value1, param2=value2), func_name2(...)] <|python_start|>",
    "tool_code": "wrap calls in ```tool_code",
    "mistral": "{{- '[TOOL_CALLS] [' }}",
    "mistral_call_id": "{{- '[TOOL_CALLS]' + name + '[CALL_ID]' + id + '[ARGS]' }}",
    "mistral_args": "{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}",
    "gemma": "{{- '<|tool_call>call:' + function['name'] + '{' -}}",
    "functiongemma": "<start_function_call>call:{{ name }}{",
    "deepseek_v3": wide("<|tool▁calls▁begin|>") + "```json",
    "deepseek_v31": wide("<|tool▁calls▁begin|>"),
    "phi4_mini": "'<|tool|>' + message['tools'] + '<|/tool|>'",
    "granite": "respond only with <|tool_call|> followed by a JSON list",
    "functools": 'functools[{"name": [function name]',
}


def test_a_template_tells_its_dialect() -> None:
    assert set(PHRASES) == set(SAMPLES)
    for name, phrase in PHRASES.items():
        dialect = dialect_for("{% if tools %}" + phrase + "{% endif %}")
        assert dialect is DIALECTS[name], name


def test_a_template_without_tools_has_none() -> None:
    assert dialect_for(None) is None
    assert dialect_for("{{ messages[0]['content'] }}") is None
    assert dialect_for("{% if tools %}unheard of{% endif %}") is None


def test_a_dialect_can_be_named() -> None:
    assert all(dialect_named(name).name == name for name in DIALECTS)
    with pytest.raises(InputError, match="nonesuch") as caught:
        dialect_named("nonesuch")
    assert "hermes" in str(caught.value.remedy)
