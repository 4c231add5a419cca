"""Many requests of every kind beside each other: each gets the answer that it gets alone."""

from __future__ import annotations

import base64
import concurrent.futures
import io
from collections.abc import Iterator
from typing import Any

import pytest

from ..families.pictures import picture
from .running import Running, serving
from .test_structured_output import SCHEMA

REQUESTS = 64


@pytest.fixture(scope="module")
def bundled() -> Iterator[Running]:
    with serving(None, max_num_seqs=64, memory=2**28) as running:
        yield running.ready()


def data_url(seed: int, width: int, height: int) -> str:
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.2},
    {"temperature": 1.5, "top_k": 20, "frequency_penalty": 0.5},
    {"temperature": 1.2, "min_p": 0.05, "presence_penalty": 0.3, "logprobs": True},
)
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"guided_json": SCHEMA},
    {"stop": ["e", "."]},
    {"regex": "[a-z]{3,12}( [0-9]{2})?"},
    {"choice": ["left", "right", "both"]},
    {"logit_bias": {"40": 5, "41": -100}},
    {"ignore_eos": True},
)


def body(i: int) -> dict[str, Any]:
    """The i-th request: kinds of sampling, form, picture and length in every combination."""
    content: list[dict[str, Any]] = [
        {"type": "text", "text": f"Question {i}: " + "what? " * (i % 9)}
    ]
    if i % 3 == 0:
        url = data_url(i % 5, 32 + 16 * (i % 4), 48)
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 8 + 7 * (i % 4),
        "seed": i,
        **SAMPLING[i % len(SAMPLING)],
        **FORMS[i % len(FORMS)],
    }


def ask(running: Running, i: int) -> dict[str, Any]:
    reply = running.post("/v1/chat/completions", body(i), timeout=280)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return {"choice": choice, "tokens": reply.json()["usage"]["completion_tokens"]}


def test_64_mixed_requests_get_what_they_get_alone(bundled: Running) -> None:
    alone = [ask(bundled, i) for i in range(REQUESTS)]
    with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
        together = list(pool.map(lambda i: ask(bundled, i), range(REQUESTS)))
    for i in range(REQUESTS):
        assert together[i]["choice"]["message"] == alone[i]["choice"]["message"], body(i)
        assert together[i]["tokens"] == alone[i]["tokens"]
        assert together[i]["choice"]["finish_reason"] == alone[i]["choice"]["finish_reason"]
