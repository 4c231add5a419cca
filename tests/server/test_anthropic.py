"""Anthropic's Messages: pure functions, and Anthropic's own client against the real server."""

from __future__ import annotations

import json
from typing import Any

import anthropic as vendor
import pytest

from opsin.errors import InputError
from opsin.server import anthropic
from opsin.server.bounds import Bounds
from opsin.server.request import Answer, Delta, Head
from opsin.types import ToolCall, Usage

from .conftest import KEY
from .running import Running

HEAD = Head("msg_1", 5, "tiny")
TOOL = {"name": "look", "input_schema": {"type": "object"}}


def parse(**fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, **fields}
    return anthropic.parse(json.dumps(body).encode(), Bounds())


def test_a_conversation_with_tools_and_pictures() -> None:
    picture = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    request = parse(
        system=[{"type": "text", "text": "be kind", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": picture},
                    {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}},
                    {"type": "text", "text": "what?"},
                ],
            },
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": ""},
                    {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "a cat"},
                    {"type": "text", "text": "so?"},
                ],
            },
        ],
        stop_sequences=["END"],
        temperature=0.5,
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "look", "disable_parallel_tool_use": True},
        thinking={"type": "enabled", "budget_tokens": 1024},
    )
    roles = [message.role for message in request.messages]
    assert roles == ["system", "user", "assistant", "tool", "user"]
    sources = [media.source for media in request.messages[1].media]
    assert sources == ["data:image/png;base64,AA==", "http://x/y.png"]
    call = request.messages[2].extra["tool_calls"][0]
    assert (call["id"], call["function"]["arguments"]) == ("t1", {"a": 1})
    assert request.messages[2].extra["reasoning_content"] == "hm"
    assert request.messages[3].extra["tool_call_id"] == "t1"
    assert request.sampling.stop == ("END",)
    assert (request.wanted.tool_choice, request.wanted.parallel_tool_calls) == ("=look", False)
    assert (request.thinking_budget, request.template) == (1024, {"enable_thinking": True})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0]"),
        ({"system": [{"type": "image"}]}, "system"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"mcp_servers": []}, "mcp_servers"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(**fields)
    assert caught.value.param == param


def answer() -> Answer:
    return Answer(
        "see",
        "hm",
        [ToolCall(0, "t1", "look", '{"a":1}')],
        finish_reason="tool_calls",
        usage=Usage(10, 3, 4),
    )


def test_a_whole_message() -> None:
    reply = anthropic.render(HEAD, answer())
    assert [block["type"] for block in reply["content"]] == ["thinking", "text", "tool_use"]
    assert reply["content"][2]["input"] == {"a": 1}
    assert reply["stop_reason"] == "tool_use"
    assert reply["usage"]["input_tokens"] == 6
    assert reply["usage"]["cache_read_input_tokens"] == 4


def test_events_open_and_close_one_block_after_another() -> None:
    renderer = anthropic.EventRenderer(HEAD, 10)
    events = renderer.opening()
    events += renderer.push(Delta(reasoning="h"))
    events += renderer.push(Delta(reasoning="m", text="se"))
    events += renderer.push(Delta(text="e", tool_calls=(ToolCall(0, "t1", "look"),)))
    events += renderer.push(Delta(tool_calls=(ToolCall(0, arguments='{"a":1}'),)))
    events += renderer.push(Delta(finish_reason="tool_calls", usage=Usage(10, 3)))
    events += renderer.closing()
    kinds = [event["type"].removeprefix("content_block_") for event in events]
    assert kinds == [
        "message_start",
        *("start", "delta", "delta", "delta", "stop"),
        *("start", "delta", "delta", "stop"),
        *("start", "delta", "stop"),
        *("message_delta", "message_stop"),
    ]
    assert [e["index"] for e in events if e["type"] == "content_block_start"] == [0, 1, 2]
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 3


@pytest.fixture(scope="module")
def client(server: Running) -> vendor.Anthropic:
    return vendor.Anthropic(base_url=server.url, api_key="unused", max_retries=0)


ASKED: dict[str, Any] = {
    "model": "default",
    "max_tokens": 6,
    "messages": [{"role": "user", "content": "hello"}],
    "extra_body": {"ignore_eos": True},
}


def test_a_stream_says_what_the_whole_message_says(client: vendor.Anthropic) -> None:
    whole = client.messages.create(**ASKED)
    with client.messages.stream(**ASKED) as stream:
        final = stream.get_final_message()
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert final.stop_reason == whole.stop_reason == "max_tokens"
    assert final.usage.output_tokens == whole.usage.output_tokens == 6
    assert final.usage.input_tokens == whole.usage.input_tokens


def test_a_stop_sequence_is_named(client: vendor.Anthropic) -> None:
    text = client.messages.create(**ASKED).content[0].text
    stopped = client.messages.create(**ASKED, stop_sequences=["never this", text[2]])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[2])


def test_tokens_are_counted_with_pictures(client: vendor.Anthropic, data_url: str) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": data_url.partition(",")[2]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "hello"}]
    messages = [{"role": "user", "content": content}]
    counted = client.messages.count_tokens(model="default", messages=messages)
    whole = client.messages.create(**{**ASKED, "messages": messages})
    assert counted.input_tokens == whole.usage.input_tokens
    plain = client.messages.count_tokens(model="default", messages=ASKED["messages"])
    assert counted.input_tokens > plain.input_tokens


def test_row_27_sizes_and_times_are_stated_here_too(
    client: vendor.Anthropic, data_url: str
) -> None:
    source: Any = {"type": "base64", "media_type": "image/png", "data": data_url.partition(",")[2]}
    asked: Any = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    whole = client.messages.create(model="default", max_tokens=3, messages=asked)
    held = whole.to_dict()
    (image,) = held["images"]
    assert (image["width"], image["height"]) == (80, 60)
    assert held["timings"]["generate"] > 0
    events = client.messages.create(model="default", max_tokens=3, messages=asked, stream=True)
    (last,) = [event.to_dict() for event in events if event.type == "message_delta"]
    assert last["images"] == held["images"]
    assert last["timings"]["generate"] > 0


def test_errors_have_anthropics_shape(client: vendor.Anthropic, keyed: Running) -> None:
    with pytest.raises(vendor.BadRequestError) as caught:
        client.messages.create(**{**ASKED, "extra_body": {"temperature": -1}})
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    with pytest.raises(vendor.NotFoundError):
        client.messages.create(**{**ASKED, "model": "no/such"})
    stranger = vendor.Anthropic(base_url=keyed.url, api_key="wrong", max_retries=0)
    with pytest.raises(vendor.AuthenticationError):
        stranger.messages.create(**ASKED)
    known = vendor.Anthropic(base_url=keyed.url, api_key=KEY, max_retries=0)
    assert known.messages.create(**ASKED).content
