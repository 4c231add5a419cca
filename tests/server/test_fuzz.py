"""Bodies that are nearly right, by the thousand: never a 5xx, never a repr, always JSON."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .running import Running
from .test_security import is_clean

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats(-2, 9) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
PARTS = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=20)}),
    st.fixed_dictionaries({"type": st.sampled_from(["image_url", "input_image", "input_audio"])}),
    st.fixed_dictionaries(
        {
            "type": st.just("image_url"),
            "image_url": st.one_of(
                JSON, st.fixed_dictionaries({"url": st.text(max_size=9) | st.just("data:,x")})
            ),
        }
    ),
    JSON,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "system", "tool", "x"]),
            "content": st.one_of(st.text(max_size=20), st.lists(PARTS, max_size=3), JSON),
        },
        optional={"name": JSON, "tool_calls": JSON, "tool_call_id": JSON},
    ),
    max_size=3,
)
NUMBERS = st.one_of(st.integers(-1, 9), st.floats(-1, 2), st.none(), JSON)
NUMERIC = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "repetition_penalty",
    "presence_penalty",
    "top_logprobs",
    "resize_shape",
    "thinking_budget",
)
CHAT = st.fixed_dictionaries(
    {"messages": MESSAGES, "max_tokens": st.just(2)},
    optional={
        **dict.fromkeys(NUMERIC, NUMBERS),
        "logprobs": st.booleans() | JSON,
        "stop": st.text(max_size=3) | JSON,
        "stream": st.booleans() | JSON,
        "tools": JSON,
        "tool_choice": JSON,
        "response_format": JSON,
        "logit_bias": st.dictionaries(st.integers(0, 600).map(str), st.floats(-9, 9)) | JSON,
        "processor_kwargs": JSON,
        "chat_template_kwargs": JSON,
    },
)
OTHERS = st.one_of(
    st.tuples(
        st.just("/v1/completions"),
        st.fixed_dictionaries({"prompt": JSON, "max_tokens": st.just(1)}, optional={"n": NUMBERS}),
    ),
    st.tuples(
        st.just("/v1/responses"),
        st.fixed_dictionaries(
            {"input": MESSAGES | JSON, "max_output_tokens": st.just(1)},
            optional={"tools": JSON, "text": JSON, "reasoning": JSON, "instructions": JSON},
        ),
    ),
    st.tuples(
        st.just("/v1/messages"),
        st.fixed_dictionaries(
            {"messages": MESSAGES, "max_tokens": st.just(1)},
            optional={"system": JSON, "tools": JSON, "tool_choice": JSON, "thinking": JSON},
        ),
    ),
    st.tuples(st.just("/tokenize"), st.fixed_dictionaries({}, optional={"prompt": JSON})),
    st.tuples(st.just("/detokenize"), st.fixed_dictionaries({"tokens": JSON})),
)
QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def check(server: Running, path: str, body: Any) -> None:
    reply = server.post(path, body)
    assert reply.status_code < 500, reply.text
    if reply.status_code != 200:
        assert "error" in reply.json()
        assert is_clean(reply.text.replace("\\", ""))


@QUICK
@given(body=CHAT)
def test_chat_bodies(server: Running, body: Any) -> None:
    check(server, "/v1/chat/completions", body)


@QUICK
@given(asked=OTHERS)
def test_other_bodies(server: Running, asked: tuple[str, Any]) -> None:
    check(server, *asked)


@settings(QUICK, max_examples=60)
@given(
    body=st.binary(max_size=60),
    path=st.sampled_from(["/v1/messages", "/v1/audio/transcriptions", "/unload"]),
)
def test_bytes(server: Running, path: str, body: bytes) -> None:
    kind = "multipart/form-data; boundary=B" if "audio" in path else "application/json"
    reply = server.client.post(path, content=body or b"x", headers={"content-type": kind})
    assert 400 <= reply.status_code < 500
