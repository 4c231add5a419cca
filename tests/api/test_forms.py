"""Forms of answers and tools through the Python API and the command line."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict
from typer.testing import CliRunner

import opsin
from opsin.cli import app
from opsin.errors import InputError
from opsin.prompt.tools.index import DIALECTS

from ..families.checkpoints import write_checkpoint
from ..families.zoo import qwen
from ..server.tool_template import TOOL_TEMPLATE

HOT: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 300}


class Answer(BaseModel):
    """What is asked for."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "blue"]
    far: bool


SCHEMA = Answer.model_json_schema()
TOOL: dict[str, Any] = {"name": "paint", "description": "Paint.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": TOOL}]


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    return opsin.load("bundled", device="cpu")


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    case = next(case for case in qwen.CASES if case.family == "qwen3_vl")
    folder = tmp_path_factory.mktemp("caller")
    write_checkpoint(dataclasses.replace(case, chat_template=TOOL_TEMPLATE), folder)
    return opsin.load(str(folder), device="cpu")


def test_an_answer_ends_where_the_model_asks_for_the_results_of_its_calls(
    caller: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    special = caller[1].tokenizer.special_tokens
    mark = next(m for m in special if m not in ("<tool_call>", "</tool_call>") and "pad" in m)
    token = caller[1].tokenizer.token_to_id(mark)
    forced = {"logit_bias": {token: 100.0}, "max_tokens": 3, "ignore_eos": True, "tools": TOOLS}

    def ask() -> tuple[int, str | None]:
        result = opsin.generate(*caller, "Paint it", **forced)
        return result.generation_tokens, result.finish_reason

    assert ask() == (3, "length")
    monkeypatch.setattr(DIALECTS["hermes"], "stops", (mark, "<not a token>"))
    assert ask() == (1, "stop")


@pytest.mark.parametrize(
    "form",
    [
        {"json_schema": Answer},
        {"json_schema": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
        {"response_format": Answer},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ],
)
def test_an_answer_keeps_to_a_schema(bundled: tuple[Any, Any], form: dict[str, Any]) -> None:
    result = opsin.generate(*bundled, "What is it?", **HOT, **form)
    assert result.finish_reason == "stop"
    Answer.model_validate_json(result.text)


def test_an_answer_keeps_to_a_text_form(bundled: tuple[Any, Any]) -> None:
    for form, pattern in (
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'start: "a" | "b"'}, "a|b"),
    ):
        parts = list(opsin.stream_generate(*bundled, "What is it?", **HOT, **form))
        assert re.fullmatch(pattern, "".join(part.text for part in parts))
    results = opsin.batch_generate(*bundled, prompts=["a", "b"], choice=["yes", "no"], **HOT)
    assert all(result.text in ("yes", "no") for result in results)


def test_steps_keep_to_a_form(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    inputs = opsin.prepare_inputs(processor, prompts="What is it?")
    steps = opsin.generate_step(inputs["input_ids"], model, regex="[0-9]{4}")
    assert re.fullmatch("[0-9]{4}", processor.tokenizer.decode([token for token, _ in steps]))
    with pytest.raises(InputError, match="Tools"):
        next(opsin.generate_step(inputs["input_ids"], model, tools=TOOLS))


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"regex": "["}, "regex"),
        ({"regex": "a", "choice": ["a"]}, "choice"),
        ({"json_schema": "{"}, "json_schema"),
        ({"response_format": 3}, "response_format"),
        ({"tools": "paint"}, "tools"),
        ({"tools": [{}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS}, "tools"),
    ],
)
def test_what_is_wrong_is_named(
    bundled: tuple[Any, Any], arguments: dict[str, Any], param: str
) -> None:
    with pytest.raises(InputError) as caught:
        opsin.generate(*bundled, "What?", max_tokens=2, **arguments)
    assert caught.value.param == param


def test_calls_are_in_the_result_and_go_back_with_their_results(caller: tuple[Any, Any]) -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", **HOT}
    result = opsin.generate(*caller, "Paint it", **asked)
    assert result.finish_reason == "tool_calls"
    assert result.text == ""
    for call in result.tool_calls:
        assert call.name == "paint"
        Answer.model_validate_json(call.arguments)
    pieces = [p for r in opsin.stream_generate(*caller, "Paint it", **asked) for p in r.tool_calls]
    joined = "".join(piece.arguments for piece in pieces if piece.index == 0)
    assert joined == result.tool_calls[0].arguments
    calls = [
        {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        for call in result.tool_calls
    ]
    messages = [
        {"role": "user", "content": "Paint it"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": calls[0]["id"], "content": "done"},
    ]
    text = opsin.apply_chat_template(caller[1], caller[1].config, messages, tools=TOOLS)
    assert '"name": "paint", "arguments": {"colour": ' in text
    assert "<tool_response>\ndone" in text


def test_reasoning_is_told_from_the_answer(caller: tuple[Any, Any]) -> None:
    result = opsin.generate(*caller, "Think", enable_thinking=True, max_tokens=6, ignore_eos=True)
    assert result.reasoning
    assert result.text == ""
    plain = opsin.generate(*caller, "Think", max_tokens=6, ignore_eos=True)
    assert plain.text
    assert plain.reasoning == ""


def test_the_command_line_keeps_to_a_form(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA), encoding="utf-8")
    run = CliRunner().invoke(app, ["generate", "What is it?", "--json-schema", str(file)])
    assert run.exit_code == 0, run.output
    Answer.model_validate_json(run.stdout)
    run = CliRunner().invoke(app, ["generate", "What is it?", "--regex", "[0-9]{3}"])
    assert re.fullmatch("[0-9]{3}\n", run.stdout)
