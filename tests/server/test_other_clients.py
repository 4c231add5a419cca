"""Clients built on OpenAI's, unchanged: LiteLLM and LangChain; skipped where not installed."""

from __future__ import annotations

from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

from .running import Running

QUESTION = [{"role": "user", "content": "Paint it"}]
HOT: dict[str, Any] = {"temperature": 1.5, "seed": 5, "max_tokens": 300}


class Paint(BaseModel):
    """Paint something."""

    model_config = ConfigDict(extra="forbid")
    colour: Literal["red", "blue"]
    far: bool


TOOLS = [
    {
        "type": "function",
        "function": {"name": "Paint", "description": "x", "parameters": Paint.model_json_schema()},
    }
]


@pytest.fixture(scope="module")
def litellm(caller: Running) -> Any:
    pytest.importorskip("mcp")  # some versions import it for every completion
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # nothing is fetched
        return pytest.importorskip("litellm")


def test_litellm_completes_streams_calls_and_parses(litellm: Any, caller: Running) -> None:
    where = {"model": "openai/default", "api_base": f"{caller.url}/v1", "api_key": "unused"}
    asked = {**where, "messages": QUESTION}
    whole = litellm.completion(**asked, max_tokens=6)
    chunks = list(litellm.completion(**asked, max_tokens=6, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    called = litellm.completion(**asked, **HOT, tools=TOOLS, tool_choice="required")
    call = called.choices[0].message.tool_calls[0].function
    assert call.name == "Paint"
    Paint.model_validate_json(call.arguments)
    formed = litellm.completion(**asked, **HOT, response_format=Paint)
    Paint.model_validate_json(formed.choices[0].message.content)


@pytest.fixture(scope="module")
def chat(caller: Running) -> Any:
    module = pytest.importorskip("langchain_openai")
    return module.ChatOpenAI(
        model="default", base_url=f"{caller.url}/v1", api_key="unused", max_retries=0, **HOT
    )


def test_langchain_asks_and_streams(chat: Any) -> None:
    short = chat.bind(max_tokens=6)
    whole = short.invoke("Paint it")
    assert "".join(str(piece.content) for piece in short.stream("Paint it")) == whole.content
    assert whole.usage_metadata["output_tokens"] == 6


def test_langchain_binds_tools_and_feeds_results_back(chat: Any) -> None:
    core = pytest.importorskip("langchain_core.messages")
    bound = chat.bind_tools([Paint], tool_choice="any")
    said = bound.invoke("Paint it")
    for call in said.tool_calls:
        Paint.model_validate(call["args"])
    assert said.tool_calls
    results = [core.ToolMessage("done", tool_call_id=call["id"]) for call in said.tool_calls]
    after = (
        chat.bind_tools([Paint])
        .bind(max_tokens=4)
        .invoke([core.HumanMessage("Paint it"), said, *results])
    )
    assert after.usage_metadata["input_tokens"] > said.usage_metadata["input_tokens"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_langchain_gives_structured_output(chat: Any, method: str) -> None:
    if method == "json_mode":
        formed = chat.bind(response_format={"type": "json_object"}, max_tokens=20)
        try:
            text = formed.invoke("Paint it in JSON").content
        except openai.LengthFinishReasonError as cut:  # as this client says it of any server
            text = cut.completion.choices[0].message.content or ""
        assert text.startswith("{")
        return
    assert isinstance(chat.with_structured_output(Paint, method=method).invoke("Paint it"), Paint)
