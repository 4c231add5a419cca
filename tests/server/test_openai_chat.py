"""Chat completions as pure functions: bodies in, requests out; deltas in, replies out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from opsin.errors import InputError, MediaTooLarge
from opsin.server import openai_chat
from opsin.server.bounds import Bounds
from opsin.server.request import Answer, Delta, Head, ImageSize, Request
from opsin.types import Media, SamplingParams, Timings, TokenLogprob, ToolCall, Usage

HEAD = Head("chatcmpl-1", 123, "tiny")
BOUNDS = Bounds(max_media=3, max_n=4)


class Names:
    """Token names without a tokenizer."""

    def data(self, token_id: int) -> bytes:
        return {1: b"a", 2: b"\xe2\x82"}[token_id]


def parse(**fields: Any) -> Request:
    body = {"messages": [{"role": "user", "content": "hello"}], **fields}
    return openai_chat.parse(json.dumps(body).encode(), BOUNDS)


def refused(**fields: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        parse(**fields)
    return caught.value


def test_defaults_are_greedy_and_bounded() -> None:
    request = parse()
    assert request.sampling == SamplingParams(max_tokens=4096)
    assert (request.model, request.n, request.stream) == ("default", 1, False)


def test_every_sampling_field_arrives() -> None:
    request = parse(
        max_tokens=9,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        repetition_context_size=20,
        no_repeat_ngram_size=3,
        no_repeat_ngram_window=9,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={"5": -100, "7": 2.5},
        seed=11,
        stop=["a", "b"],
        stop_token_ids=[3],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=2,
        n=2,
    )
    assert request.sampling == SamplingParams(
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        repetition_context_size=20,
        no_repeat_ngram_size=3,
        no_repeat_ngram_window=9,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={5: -100, 7: 2.5},
        seed=11,
        stop=("a", "b"),
        stop_token_ids=(3,),
        ignore_eos=True,
        logprobs=2,
    )
    assert request.n == 2


def test_template_and_picture_options_arrive() -> None:
    request = parse(
        enable_thinking=False,
        chat_template_kwargs={"custom": 1},
        processor_kwargs={"max_pixels": 1000},
        resize_shape=[30, 40],
        reasoning_effort="low",
        thinking_budget=5,
        cache_salt="s",
    )
    assert request.template == {
        "enable_thinking": False,
        "chat_template_kwargs": {"custom": 1, "reasoning_effort": "low"},
    }
    assert request.processor == {"max_pixels": 1000, "resize_shape": [30, 40]}
    assert (request.thinking_budget, request.salt) == (5, "s")


@pytest.mark.parametrize(
    ("effort", "thinking"), [("none", False), ("minimal", True), ("high", True)]
)
def test_reasoning_effort_switches_thinking(effort: str, thinking: bool) -> None:
    assert parse(reasoning_effort=effort).template["enable_thinking"] is thinking


def test_media_of_every_kind_become_parts() -> None:
    content = [
        {"type": "text", "text": "look"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
        {"type": "input_audio", "input_audio": {"data": "AA==", "format": "mp3"}},
        {"type": "video_url", "video_url": {"url": "clip.mp4"}},
    ]
    request = parse(messages=[{"role": "user", "content": content}], video_fps=3)
    image, audio, video = request.messages[0].media
    assert image == Media("image", "data:image/png;base64,AA==", {"detail": "low"})
    assert audio.source == "data:audio/mp3;base64,AA=="
    assert (video.source, video.options) == ("clip.mp4", {"fps": 3})


def test_roles_and_tool_turns() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    request = parse(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
        ]
    )
    assert [message.role for message in request.messages] == ["system", "user", "assistant", "tool"]
    assert request.messages[2].extra["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert request.messages[3].extra["tool_call_id"] == "c1"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"surprise": 1}, "surprise"),
        ({"messages": []}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
        ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"seed": 2**64}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web"}]}, "tools[0]"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"processor_kwargs": {"size": [-1]}}, "processor_kwargs.size"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str | None) -> None:
    error = refused(**fields)
    assert error.status == 400
    if param is not None:
        assert error.param is not None
        assert error.param.startswith(param)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_no_object(body: bytes) -> None:
    with pytest.raises(InputError):
        openai_chat.parse(body, BOUNDS)


def test_too_many_pictures_are_refused_before_any_is_fetched() -> None:
    part = {"type": "image_url", "image_url": {"url": "http://203.0.113.1/x.png"}}
    with pytest.raises(MediaTooLarge, match="--max-media"):
        parse(messages=[{"role": "user", "content": [part] * 4}])


def test_a_template_of_a_request_needs_the_operators_leave() -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ messages }}"}
    allowed = replace(BOUNDS, allow_templates=True)
    assert openai_chat.parse(json.dumps(body).encode(), allowed).template["chat_template"]
    body["chat_template"] = "some/file.jinja"
    with pytest.raises(InputError, match="not a Jinja template"):
        openai_chat.parse(json.dumps(body).encode(), allowed)
    body["chat_template"] = "vicuna"
    assert openai_chat.parse(json.dumps(body).encode(), BOUNDS).template == {
        "chat_template": "vicuna"
    }


def answer(**changes: Any) -> Answer:
    held = Answer(
        "hi",
        finish_reason="stop",
        usage=Usage(10, 2, 4, {"image": 5}),
        timings=Timings(prefill=0.5),
        images=(ImageSize(80, 60, 64, 64, 5),),
    )
    for name, value in changes.items():
        setattr(held, name, value)
    return held


def test_a_whole_reply() -> None:
    reply = openai_chat.render(HEAD, [answer()], parse(), Names())
    assert reply["object"] == "chat.completion"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hi", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert reply["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
        "prompt_tokens_details": {
            "cached_tokens": 4,
            "image_tokens": 5,
            "audio_tokens": 0,
            "video_tokens": 0,
        },
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert reply["timings"]["prefill"] == 0.5
    assert reply["images"] == [
        {"width": 80, "height": 60, "processed_width": 64, "processed_height": 64, "tokens": 5}
    ]


def test_several_answers_count_the_prompt_once() -> None:
    reply = openai_chat.render(HEAD, [answer(), answer()], parse(n=2), Names())
    assert reply["usage"]["prompt_tokens"] == 10
    assert reply["usage"]["completion_tokens"] == 4
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]


def test_reasoning_and_tool_calls_of_a_whole_reply() -> None:
    calls = [ToolCall(0, "c1", "f", "{}")]
    held = answer(text="", reasoning="hm", tool_calls=calls, finish_reason="tool_calls")
    message = openai_chat.render(HEAD, [held], parse(), Names())["choices"][0]["message"]
    assert message["content"] is None
    assert message["reasoning_content"] == "hm"
    assert message["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ]


def test_log_probabilities_state_bytes() -> None:
    entry = TokenLogprob(2, -0.5, ((2, -0.5), (1, float("-inf"))))
    held = answer(logprobs=[entry])
    reply = openai_chat.render(HEAD, [held], parse(logprobs=True, top_logprobs=2), Names())
    content = reply["choices"][0]["logprobs"]["content"]
    assert content[0]["bytes"] == [0xE2, 0x82]
    assert content[0]["token"] == "\ufffd"
    assert content[0]["top_logprobs"][1] == {"token": "a", "logprob": -9999.0, "bytes": [97]}


DELTAS = [
    Delta(0, "", "let me"),
    Delta(0, "he"),
    Delta(0, tool_calls=(ToolCall(0, "c1", "f", ""),)),
    Delta(0, tool_calls=(ToolCall(0, arguments='{"a"'),)),
    Delta(
        0,
        "y",
        tool_calls=(ToolCall(0, arguments=":1}"),),
        finish_reason="tool_calls",
        usage=Usage(3, 4),
        timings=Timings(),
    ),
]


def test_a_stream_and_its_fold_say_the_same() -> None:
    request = parse(stream=True, stream_options={"include_usage": True})
    renderer = openai_chat.ChunkRenderer(HEAD, request, Names())
    chunks = renderer.opening()
    whole = Answer()
    for delta in DELTAS:
        chunks += renderer.push(delta)
        whole.add(delta)
    chunks += renderer.closing()
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(piece.get("content") or "" for piece in pieces) == whole.text == "hey"
    assert "".join(p.get("reasoning_content", "") for p in pieces) == whole.reasoning == "let me"
    arguments = [c["function"]["arguments"] for p in pieces for c in p.get("tool_calls", [])]
    assert "".join(arguments) == whole.tool_calls[0].arguments == '{"a":1}'
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert {chunk["id"] for chunk in chunks} == {HEAD.id}
