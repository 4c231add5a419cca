"""The requests that Open WebUI sends for one conversation, in its order and with its fields."""

from __future__ import annotations

import json
from typing import Any

import httpx

from .running import Running
from .test_structured_output import SCHEMA

HEADERS = {
    "Authorization": "Bearer sk-anything",
    "Content-Type": "application/json",
    "X-OpenWebUI-User-Name": "Ada",
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look_up", "description": "Looks it up", "parameters": SCHEMA},
    }
]


def chunks(reply: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_conversation_as_open_webui_holds_it(caller: Running, data_url: str) -> None:
    def post(**fields: Any) -> httpx.Response:
        body = {"model": name, "max_tokens": 12, **fields}
        reply = caller.client.post("/v1/chat/completions", json=body, headers=HEADERS)
        assert reply.status_code == 200, reply.text
        return reply

    listed = caller.client.get("/v1/models", headers=HEADERS).json()
    assert listed["object"] == "list"
    name = listed["data"][0]["id"]

    # The question, streamed, with the picture as a data URL.
    content = [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": data_url}},
    ]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": content},
    ]
    usage = {"include_usage": True}
    parts = chunks(post(stream=True, messages=messages, stream_options=usage, temperature=0.8))
    said = "".join(p["choices"][0]["delta"].get("content") or "" for p in parts if p["choices"])
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["prompt_tokens_details"]["image_tokens"] > 0

    # A title, tags and follow-up questions, each in one piece.
    for task in ("title", "tags", "follow-ups"):
        asked = [{"role": "user", "content": f"Write {task} as JSON for: {said}"}]
        body = {"model": name, "messages": asked, "stream": False, "max_completion_tokens": 20}
        reply = caller.client.post("/v1/chat/completions", json=body, headers=HEADERS).json()
        assert isinstance(reply["choices"][0]["message"]["content"], str)

    # The next turn calls a tool; its call comes back with the index of its pieces.
    messages += [
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Look it up"},
    ]
    hot = {"temperature": 1.5, "seed": 5, "max_tokens": 300, "parallel_tool_calls": False}
    parts = chunks(post(stream=True, messages=messages, tools=TOOLS, tool_choice="required", **hot))
    call: dict[str, Any] = {"function": {"name": "", "arguments": ""}}
    for part in parts:
        for piece in part["choices"][0]["delta"].get("tool_calls") or ():
            call |= {key: value for key, value in piece.items() if key != "function"}
            call["function"]["name"] += piece["function"].get("name") or ""
            call["function"]["arguments"] += piece["function"].get("arguments") or ""
    assert call["index"] == 0
    assert set(json.loads(call["function"]["arguments"])) == set(SCHEMA["required"])
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "found"},
    ]
    parts = chunks(post(stream=True, messages=messages, tools=TOOLS))
    assert parts[-1]["choices"][0]["finish_reason"] in ("stop", "length")
