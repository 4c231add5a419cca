"""Tools through the vendors' own clients: calls forced, streamed, held to schemas and fed back."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest

from .running import Running

COLOURS = ["red", "green", "blue"]
PAINT: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}, "count": {"type": "integer", "maximum": 9}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
LOOK: dict[str, Any] = {"type": "object", "properties": {"far": {"type": "boolean"}}}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "paint", "description": "x", "parameters": PAINT}},
    {"type": "function", "function": {"name": "look", "parameters": LOOK}},
]
HOT: dict[str, Any] = {"temperature": 1.5, "seed": 5, "max_tokens": 300}


def asked(text: str = "Paint it", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "default", "messages": messages, "tools": TOOLS, **fields}


@pytest.fixture(scope="module")
def client(caller: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{caller.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def claude(caller: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=caller.url, api_key="unused", max_retries=0)


def check(name: str, arguments: Any) -> None:
    """A call is of one of the tools, with arguments of its schema."""
    if name == "paint":
        assert arguments["colour"] in COLOURS
        assert isinstance(arguments["count"], int)
        assert set(arguments) == {"colour", "count"}
    else:
        assert name == "look"
        assert set(arguments) <= {"far"}


@pytest.mark.parametrize("seed", range(4))
def test_a_required_call_is_made_whatever_the_weights(client: openai.OpenAI, seed: int) -> None:
    reply = client.chat.completions.create(**asked(tool_choice="required", **{**HOT, "seed": seed}))
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls
    for call in choice.message.tool_calls:
        check(call.function.name, json.loads(call.function.arguments))
    assert len({call.id for call in choice.message.tool_calls}) == len(choice.message.tool_calls)


def test_a_named_call_is_of_that_tool_and_one(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "look"}}
    for seed in range(3):
        fields = {**HOT, "seed": seed}
        reply = client.chat.completions.create(**asked(tool_choice=named, **fields))
        (call,) = reply.choices[0].message.tool_calls or ()
        assert call.function.name == "look"


def test_one_call_at_most_where_parallel_ones_are_not_wanted(client: openai.OpenAI) -> None:
    many, one = [], []
    for seed in range(4):
        fields = {**HOT, "seed": seed, "tool_choice": "required"}
        many.append(client.chat.completions.create(**asked(**fields)))
        one.append(client.chat.completions.create(**asked(**fields, parallel_tool_calls=False)))
    assert max(len(reply.choices[0].message.tool_calls or ()) for reply in many) > 1
    assert all(len(reply.choices[0].message.tool_calls or ()) == 1 for reply in one)


def test_a_streams_deltas_add_up_to_the_whole_reply(client: openai.OpenAI) -> None:
    fields = asked(tool_choice="required", **HOT)
    whole = client.chat.completions.create(**fields).choices[0]
    chunks = list(client.chat.completions.create(**fields, stream=True))
    pieces = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    calls = whole.message.tool_calls or []
    assert len(pieces) > len(calls)
    for index, call in enumerate(calls):
        own = [piece for piece in pieces if piece.index == index]
        assert own[0].id
        assert own[0].type == "function"
        assert [p.function.name for p in own if p.function and p.function.name] == [
            call.function.name
        ]
        joined = "".join(p.function.arguments or "" for p in own if p.function)
        assert joined == call.function.arguments
        assert [piece.id for piece in own[1:]] == [None] * (len(own) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason == "tool_calls"


def test_the_clients_own_stream_helper_reads_the_calls(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**asked(tool_choice="required", **HOT)) as stream:
        final = stream.get_final_completion()
    for call in final.choices[0].message.tool_calls or ():
        check(call.function.name, json.loads(call.function.arguments))


def test_nothing_is_offered_where_no_tool_is_to_be_chosen(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(**{**asked(max_tokens=4), "tools": openai.omit})
    none = client.chat.completions.create(**asked(max_tokens=4, tool_choice="none"))
    auto = client.chat.completions.create(**asked(max_tokens=4))
    assert none.usage == plain.usage
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert auto.usage is not None
    assert plain.usage is not None
    assert auto.usage.prompt_tokens > plain.usage.prompt_tokens


def test_results_are_fed_back_in_the_models_own_form(
    client: openai.OpenAI, caller: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = client.chat.completions.create(**asked(tool_choice="required", **HOT)).choices[0]
    processor = caller.service.manager.loaded[0].processor
    texts: list[str] = []
    assemble = processor.assemble

    def seen(text: str, *rest: Any) -> Any:
        texts.append(text)
        return assemble(text, *rest)

    monkeypatch.setattr(processor, "assemble", seen)
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"result {i}"}
        for i, call in enumerate(first.message.tool_calls or ())
    ]
    messages = [{"role": "user", "content": "Paint it"}, first.message, *results]
    client.chat.completions.create(**{**asked(max_tokens=2), "messages": messages})
    call = (first.message.tool_calls or [])[0].function
    assert f'<tool_call>\n{{"name": "{call.name}", "arguments": {{' in texts[0]
    assert "<tool_response>\nresult 0\n</tool_response>" in texts[0]


def test_a_model_thinks_before_it_must_call(client: openai.OpenAI) -> None:
    extra = {"enable_thinking": True, "thinking_budget": 12}
    fields = asked(tool_choice="required", **HOT, extra_body=extra)
    reply = client.chat.completions.create(**fields)
    message = reply.choices[0].message
    assert message.model_dump()["reasoning_content"]
    assert message.tool_calls
    assert not message.content
    details = reply.usage.completion_tokens_details if reply.usage else None
    assert details is not None
    assert 12 <= details.reasoning_tokens < 24  # the budget, and the tokens of the closing tag


def test_a_strict_tool_is_held_to_its_schema_once_a_call_is_opened(caller: Running) -> None:
    opening = "<tool_call>\n"
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    tokenizer = caller.service.manager.loaded[0].processor.tokenizer
    first = tokenizer.encode("<tool_call>")
    bias = {str(first[0]): 100}
    for seed in range(3):
        body = asked(**{**HOT, "seed": seed}, logit_bias=bias)
        reply = caller.post("/v1/chat/completions", {**body, "tools": strict}).json()
        message = reply["choices"][0]["message"]
        assert opening not in (message["content"] or "")
        calls = [call["function"] for call in message["tool_calls"]]
        for call in calls[:-1] if reply["choices"][0]["finish_reason"] == "length" else calls:
            check(call["name"], json.loads(call["arguments"]))


def test_a_form_and_tools_together_give_the_form_or_a_call(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}},
    }
    kinds = set()
    for seed in range(3):
        fields = {**HOT, "seed": seed, "response_format": form}
        choice = client.chat.completions.create(**asked(**fields)).choices[0]
        kinds.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert set(json.loads(choice.message.content or "")) == {"ok"}
        for call in choice.message.tool_calls or ():
            check(call.function.name, json.loads(call.function.arguments))
    assert kinds <= {"stop", "tool_calls"}


def test_responses_have_function_calls_and_take_their_outputs(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    fields: dict[str, Any] = {
        "model": "default",
        "tools": tools,
        "max_output_tokens": 300,
        "extra_body": {"seed": 5},
        "temperature": 1.5,
    }
    reply = client.responses.create(input="Paint it", tool_choice="required", **fields)
    calls = [item for item in reply.output if item.type == "function_call"]
    assert calls
    assert len(calls) == len(reply.output)
    for call in calls:
        check(call.name, json.loads(call.arguments))
    results: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
        for call in calls
    ]
    fields["max_output_tokens"] = 4
    after = client.responses.create(input=results, previous_response_id=reply.id, **fields)
    assert after.usage is not None
    assert reply.usage is not None
    assert after.usage.input_tokens > reply.usage.input_tokens


def test_a_response_streams_its_calls_in_the_official_order(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    stream = client.responses.create(
        model="default",
        input="Paint it",
        tools=tools,
        tool_choice="required",
        max_output_tokens=300,
        temperature=1.5,
        stream=True,
        extra_body={"seed": 5},
    )
    events = list(stream)
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    pieces: dict[str, str] = {}
    for event in events:
        if event.type == "response.function_call_arguments.delta":
            pieces[event.item_id] = pieces.get(event.item_id, "") + event.delta
        elif event.type == "response.function_call_arguments.done":
            assert pieces[event.item_id] == event.arguments
    assert pieces


def test_anthropics_tool_use_and_results(claude: anthropic.Anthropic) -> None:
    tools: Any = [
        {"name": "paint", "description": "x", "input_schema": PAINT},
        {"name": "look", "input_schema": LOOK},
    ]
    fields: dict[str, Any] = {
        "model": "default",
        "max_tokens": 300,
        "tools": tools,
        "extra_body": {"temperature": 1.5, "seed": 5},
    }
    question: dict[str, Any] = {"role": "user", "content": "Paint it"}
    chosen: Any = {"type": "any"}
    whole = claude.messages.create(messages=[question], tool_choice=chosen, **fields)
    assert whole.stop_reason == "tool_use"
    uses = [block for block in whole.content if block.type == "tool_use"]
    assert len(uses) == len(whole.content)
    for block in uses:
        check(block.name, block.input)
    with claude.messages.stream(messages=[question], tool_choice=chosen, **fields) as stream:
        kinds = [e.delta.type for e in stream if e.type == "content_block_delta"]
        final = stream.get_final_message()
    assert set(kinds) == {"input_json_delta"}
    assert [b.input for b in final.content if b.type == "tool_use"] == [b.input for b in uses]
    results: Any = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "done"} for block in uses
    ]
    said: Any = {"role": "assistant", "content": whole.content}
    after = claude.messages.create(
        messages=[question, said, {"role": "user", "content": results}],
        **{**fields, "max_tokens": 3},
    )
    first, second = whole.usage, after.usage
    told = first.input_tokens + (first.cache_read_input_tokens or 0)
    assert second.input_tokens + (second.cache_read_input_tokens or 0) > told


def test_a_model_that_takes_no_tools_says_so(server: Running) -> None:
    for fields in ({}, {"tool_choice": "required"}):
        reply = server.post("/v1/chat/completions", asked(max_tokens=2, **fields))
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["param"] == "tools"
        assert "--chat-template" in error["message"]
    assert server.post("/v1/chat/completions", asked(tool_choice="none", max_tokens=2)).is_success


def test_a_tools_schema_that_cannot_be_enforced_is_named(client: openai.OpenAI) -> None:
    bad: Any = {"name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "x"}],
            tools=[{"type": "function", "function": bad}],
            tool_choice="required",
        )
    assert caught.value.param == "tools"
