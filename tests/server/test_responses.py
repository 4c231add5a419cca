"""OpenAI's Responses: pure functions, and OpenAI's own client against the real server."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from opsin.errors import InputError, NotFoundError
from opsin.server import openai_responses, response_events
from opsin.server.bounds import Bounds
from opsin.server.request import Answer, Delta, Head
from opsin.server.stored import ResponseStore
from opsin.types import ToolCall, Usage

from .conftest import KEY
from .running import Running

HEAD = Head("resp_1", 5, "tiny")


def parse(before: tuple[Any, ...] = (), **fields: Any) -> openai_responses.Asked:
    body = json.dumps({"input": "hi", **fields}).encode()
    return openai_responses.parse(openai_responses.read(body), before, Bounds())


def test_items_become_messages() -> None:
    asked = parse(
        instructions="be brief",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "look"}]},
            {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": "http://x/y.png", "detail": "auto"}
                ],
            },
            {"type": "reasoning", "summary": [], "content": [{"text": "hm"}]},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a":1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "done"},
        ],
        max_output_tokens=7,
        reasoning={"effort": "low"},
    )
    messages = asked.request.messages
    assert [m.role for m in messages] == ["system", "user", "user", "assistant", "tool"]
    assert messages[2].media[0].source == "http://x/y.png"
    assert messages[3].extra["reasoning"] == "hm"
    assert messages[3].extra["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert messages[4].text == "done"
    assert asked.request.sampling.max_tokens == 7


def test_an_earlier_conversation_comes_first() -> None:
    said = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "a"}],
    }
    asked = parse(({"role": "user", "content": "q"}, said))
    assert [message.text for message in asked.request.messages] == ["q", "a", "hi"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "x", "odd": 1}]}, "input[0].odd"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].file_id",
        ),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"conversation": "c"}, "conversation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(**fields)
    assert caught.value.param == param


def test_events_come_in_the_official_order() -> None:
    done: list[dict[str, Any]] = []
    renderer = response_events.EventRenderer(HEAD, parse(), None, done.append)
    renderer._logprobs = lambda values: []  # type: ignore[method-assign]
    events = renderer.opening()
    events += renderer.push(Delta(reasoning="h"))
    events += renderer.push(Delta(text="a"))
    events += renderer.push(Delta(text="b", tool_calls=(ToolCall(0, "c1", "f", "{"),)))
    events += renderer.push(
        Delta(
            tool_calls=(ToolCall(0, arguments="}"),),
            finish_reason="tool_calls",
            usage=Usage(5, 4, 1),
        )
    )
    events += renderer.closing()
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    (response,) = done
    assert [item["type"] for item in response["output"]] == [
        "reasoning",
        "message",
        "function_call",
    ]
    assert response["output"][2]["arguments"] == "{}"
    assert response["usage"]["total_tokens"] == 9
    assert events[-1]["response"] == response


def test_an_answer_cut_short_is_incomplete() -> None:
    held = Answer("x", finish_reason="length", usage=Usage(1, 1))

    class Names:
        def data(self, token_id: int) -> bytes:
            return b""

    response = response_events.render(HEAD, parse(), held, Names(), lambda done: None)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"


def test_stored_responses_are_bounded_and_apart_for_each_key() -> None:
    store = ResponseStore(2, max_bytes=1000)
    for i in range(3):
        store.put("a", {"id": f"r{i}"}, (), ({"n": i},), ())
    with pytest.raises(NotFoundError):
        store.get("a", "r0")
    with pytest.raises(NotFoundError):
        store.get("b", "r2")
    store.put("a", {"id": "big"}, (), ("x" * 990,), ())
    assert store.get("a", "r2").items == ({"n": 2},)
    store.put("a", {"id": "fits"}, (), ("x" * 960,), ())
    with pytest.raises(NotFoundError):
        store.get("a", "r2")
    store.delete("a", "fits")
    with pytest.raises(NotFoundError):
        store.get("a", "fits")


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


ASKED: dict[str, Any] = {
    "model": "default",
    "input": "hello",
    "max_output_tokens": 6,
    "extra_body": {"ignore_eos": True},
}


def test_a_stream_says_what_the_whole_response_says(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    assert (whole.status, whole.usage.output_tokens) == ("incomplete", 6)
    events = list(client.responses.create(**ASKED, stream=True))
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert deltas == whole.output_text
    with client.responses.stream(**ASKED) as stream:
        for _ in stream:
            pass


def test_a_conversation_goes_on_from_a_stored_response(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASKED)
    asked = {**ASKED, "input": "and then?"}
    second = client.responses.create(**asked, previous_response_id=first.id)
    turns = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and then?"},
    ]
    assert second.output_text == client.responses.create(**{**asked, "input": turns}).output_text
    assert second.output_text != client.responses.create(**asked).output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    items = client.responses.input_items.list(second.id)
    assert [item.content for item in items.data] == ["and then?"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**asked, previous_response_id=first.id)


def test_store_false_keeps_nothing(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASKED, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_another_key_does_not_see_a_response(keyed: Running) -> None:
    mine = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=KEY, max_retries=0)
    theirs = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="another-key", max_retries=0)
    first = mine.responses.create(**ASKED)
    assert mine.responses.retrieve(first.id).id == first.id
    with pytest.raises(openai.NotFoundError):
        theirs.responses.retrieve(first.id)


def test_a_picture_is_seen(client: openai.OpenAI, data_url: str) -> None:
    content = [
        {"type": "input_image", "image_url": data_url, "detail": "auto"},
        {"type": "input_text", "text": "?"},
    ]
    reply = client.responses.create(**{**ASKED, "input": [{"role": "user", "content": content}]})
    assert reply.usage.input_tokens_details.model_dump()["image_tokens"] > 0


def test_an_error_in_a_stream_is_an_event(
    server: Running, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(openai.BadRequestError):
        client.responses.create(**ASKED, temperature=-1, stream=True)
    monkeypatch.setattr(response_events.EventRenderer, "closing", lambda self: 1 / 0)
    reply = server.post("/v1/responses", {"input": "x", "max_output_tokens": 2, "stream": True})
    last = reply.text.strip().rpartition("data: ")[2]
    assert json.loads(last)["code"] == "internal_error"
    assert "ZeroDivision" not in reply.text
