"""Answers held to a form, through the vendors' own clients and every field that asks for one."""

from __future__ import annotations

import concurrent.futures
import json
import re
import time
from typing import Any, Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel, Field

from .running import Running

QUESTION: list[Any] = [{"role": "user", "content": "What is it?"}]
HOT: dict[str, Any] = {"temperature": 1.5, "seed": 4, "max_tokens": 300}


class Inner(BaseModel):
    far: bool


class Shape(BaseModel):
    """What a client asks to be parsed."""

    colour: Literal["red", "blue"]
    count: int = Field(ge=0, le=99)
    parts: list[Inner] = Field(max_length=2)


SCHEMA = Shape.model_json_schema()
FORMS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "[0-9]{4}"}, "[0-9]{4}"),
    ({"grammar": 'start: "a" | "b" "c"'}, "a|bc"),
    ({"choice": ["yes", "no"]}, "yes|no"),
    ({"guided_regex": "x{3}"}, "xxx"),
    ({"guided_choice": ["left", "right"]}, "left|right"),
    ({"guided_grammar": 'start: "q"'}, "q"),
    ({"structured_outputs": {"regex": "[ab]{2}"}}, "[ab]{2}"),
    ({"structured_outputs": {"choice": ["up", "down"]}}, "up|down"),
    ({"structured_outputs": {"grammar": 'start: "z"'}}, "z"),
]
JSON_FORMS: list[dict[str, Any]] = [
    {"guided_json": SCHEMA},
    {"guided_json": json.dumps(SCHEMA)},
    {"structured_outputs": {"json": SCHEMA}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
]


@pytest.fixture(scope="module")
def client(caller: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{caller.url}/v1", api_key="unused", max_retries=0)


def content(running: Running, **fields: Any) -> str:
    reply = running.post("/v1/chat/completions", {"messages": QUESTION, **HOT, **fields})
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


@pytest.mark.parametrize(("fields", "pattern"), FORMS)
def test_a_form_by_any_of_its_fields(caller: Running, fields: Any, pattern: str) -> None:
    for temperature in (0, 1.5):
        assert re.fullmatch(pattern, content(caller, **fields, temperature=temperature))


@pytest.mark.parametrize("fields", JSON_FORMS)
def test_a_schema_by_any_of_its_fields(caller: Running, fields: Any) -> None:
    Shape.model_validate_json(content(caller, **fields))


def test_the_client_parses_into_a_model(client: openai.OpenAI) -> None:
    for seed in range(3):
        asked = {**HOT, "seed": seed}
        reply = client.chat.completions.parse(
            model="default", messages=QUESTION, response_format=Shape, **asked
        )
        assert isinstance(reply.choices[0].message.parsed, Shape)


def test_a_response_parses_into_a_model(client: openai.OpenAI) -> None:
    reply = client.responses.parse(
        model="default",
        input="What is it?",
        text_format=Shape,
        temperature=1.5,
        max_output_tokens=300,
        extra_body={"seed": 2},
    )
    assert isinstance(reply.output_parsed, Shape)


def test_anthropics_output_format(caller: Running) -> None:
    claude = anthropic.Anthropic(base_url=caller.url, api_key="unused", max_retries=0)
    form: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    reply = claude.messages.create(
        model="default",
        messages=QUESTION,
        max_tokens=300,
        output_config=form,
        extra_body={"temperature": 1.5, "seed": 1},
    )
    (block,) = reply.content
    assert block.type == "text"
    Shape.model_validate_json(block.text)


def test_any_json_object(caller: Running) -> None:
    # Random weights would fill an object for ever: closing it is made likely.
    tokenizer = caller.service.manager.loaded[0].processor.tokenizer
    ends = {str(token): 60 for text in ("}", '"', "]") for token in tokenizer.encode(text)}
    form = {"type": "json_object"}
    for seed in range(3):
        text = content(caller, response_format=form, logit_bias=ends, seed=seed)
        assert isinstance(json.loads(text), dict)


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "default", "messages": QUESTION, **HOT}
    asked["extra_body"] = JSON_FORMS[0]
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert len(chunks) > 5


def test_completions_take_forms_too(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="default", prompt=["a", "b"], **HOT, extra_body={"regex": "[0-9]{3}"}
    )
    assert all(re.fullmatch("[0-9]{3}", choice.text) for choice in reply.choices)


def test_every_one_of_n_answers_keeps_the_form(caller: Running) -> None:
    body = {"messages": QUESTION, **HOT, "n": 4, "regex": "[a-z]{6}"}
    choices = caller.post("/v1/chat/completions", body).json()["choices"]
    texts = [choice["message"]["content"] for choice in choices]
    assert all(re.fullmatch("[a-z]{6}", text) for text in texts)
    assert len(set(texts)) == 4


def test_a_model_thinks_before_it_answers_in_form(caller: Running) -> None:
    body = {"messages": QUESTION, **HOT, "enable_thinking": True, "thinking_budget": 10}
    reply = caller.post("/v1/chat/completions", {**body, **JSON_FORMS[0]}).json()
    message = reply["choices"][0]["message"]
    assert message["reasoning_content"]
    Shape.model_validate_json(message["content"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regex": "["}, "regex"),
        ({"grammar": "start: nothing"}, "grammar"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": {"type": "odd"}}, "guided_json"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
        ({"structured_outputs": {"odd": 1}}, "structured_outputs.odd"),
        ({"choice": []}, "choice"),
        ({"regex": "a", "choice": ["a"]}, "choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ],
)
def test_a_wrong_form_is_refused_by_name(caller: Running, fields: Any, param: str) -> None:
    reply = caller.post("/v1/chat/completions", {"messages": QUESTION, **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "(a+)+$"},
        {"regex": "((((a{0,1000}){0,1000}){0,1000}){0,1000}){0,1000}"},
        {"regex": "(" * 5000 + "a" + ")" * 5000},
        {"grammar": "start: a\na: a a a | a a | /[a-z]/"},
        {"grammar": "\n".join(f"a{i}: a{i + 1}" for i in range(9000))},
        {"guided_json": '{"items":' * 5000 + "{}" + "}" * 5000},
        {"guided_json": {"properties": {f"p{i}": {"type": "string"} for i in range(3000)}}},
        {"guided_json": {"type": "array", "minItems": 10**9, "items": {"minLength": 10**9}}},
    ],
    ids=range(8),
)
def test_row_13_a_hostile_form_costs_nobody_anything(caller: Running, fields: Any) -> None:
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        body = {"messages": QUESTION, "max_tokens": 60, **fields}
        hostile = pool.submit(caller.post, "/v1/chat/completions", body)
        plain = pool.submit(caller.chat)
        assert plain.result().status_code == 200
        assert hostile.result().status_code in (200, 400)
    assert time.monotonic() - started < 30
