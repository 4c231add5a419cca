"""OpenAI's Responses: a body and a stored conversation to a request, deltas to a response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from opsin.engine.asked import parse_tool, parse_tool_choice, response_form
from opsin.engine.form import Wanted
from opsin.errors import InputError
from opsin.server import openai_chat
from opsin.server.bounds import Bounds
from opsin.server.conversation import conversation
from opsin.server.fields import (
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOOLS,
    Body,
    Count,
    JsonObject,
    PromptFields,
    SamplingFields,
    StopText,
    processor_fields,
    sampling,
    template_fields,
    validated,
    video_fields,
)
from opsin.server.request import Request

INCLUDABLE = ("reasoning.encrypted_content", "message.output_text.logprobs")


class TextOptions(Body):
    """What form the text has; verbosity is a hint to models that were trained for it."""

    format: JsonObject | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    """How hard the model thinks; summaries are not made: the reasoning itself is sent."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class StreamOptions(Body):
    """Padding against traffic analysis, which nothing here sends."""

    include_obfuscation: bool | None = None


class ResponseBody(SamplingFields, PromptFields, openai_chat.HarmlessFields):
    """The body of a response."""

    model: Annotated[str, Field(max_length=512)] = "default"
    input: str | Annotated[list[JsonObject], Field(max_length=MAX_MESSAGES)]
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=128)] | None = None
    max_output_tokens: Count | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[JsonObject], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Count | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed body: the request, what the response repeats of it, and its own input items."""

    request: Request
    fields: ResponseBody
    given: tuple[Any, ...]

    @property
    def stores(self) -> bool:
        """Whether the response is kept."""
        return self.fields.store is not False


def read(body: bytes) -> ResponseBody:
    """The body's fields, before the conversation that it continues is looked up."""
    return validated(ResponseBody, body)


def parse(fields: ResponseBody, before: Sequence[Any], bounds: Bounds) -> Asked:
    """The request that a body makes after the items `before` it."""
    given = _items(fields.input)
    tools = tuple(parse_tool(tool, f"tools[{i}]") for i, tool in enumerate(fields.tools or ()))
    for name in fields.include or ():
        if name not in INCLUDABLE:
            raise InputError(f"{name[:80]} cannot be included", param="include")
    wants = "message.output_text.logprobs" in (fields.include or ()) or fields.top_logprobs
    form = fields.text.format if fields.text else None
    messages = _messages([*before, *given])
    if fields.instructions:
        messages.insert(0, {"role": "system", "content": fields.instructions})
    request = Request(
        model=fields.model,
        messages=conversation(messages, video_fields(fields)),
        sampling=sampling(
            fields,
            max_tokens=fields.max_output_tokens or bounds.max_tokens,
            stop=fields.stop,
            logprobs=(fields.top_logprobs or 0) if wants else None,
        ),
        template=template_fields(fields, fields.reasoning.effort if fields.reasoning else None),
        processor=processor_fields(fields),
        wanted=Wanted(
            tools,
            parse_tool_choice(fields.tool_choice, tools),
            fields.parallel_tool_calls is not False,
            None if form is None else response_form(form, "text.format"),
        ),
        thinking_budget=fields.thinking_budget,
        task=fields.task,
        salt=fields.cache_salt or "",
        stream=bool(fields.stream),
    )
    openai_chat.check(request, bounds)
    return Asked(request, fields, given)


def _items(value: str | list[JsonObject]) -> tuple[Any, ...]:
    if isinstance(value, str):
        return ({"type": "message", "role": "user", "content": value},)
    if not value:
        raise InputError("input is empty", param="input")
    return tuple(value)


def _messages(items: Sequence[Any]) -> list[dict[str, Any]]:
    """Items as chat messages: calls and reasoning join the assistant's message they belong to."""
    made: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        kind = item.get("type", "message")
        where = f"input[{i}]"
        if kind == "message":
            _add_message(made, item, where)
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "function": function}
            _assistant(made).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = item.get("output")
            made.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind == "reasoning":
            parts = [*(item.get("content") or ()), *(item.get("summary") or ())]
            texts = [str(part.get("text", "")) for part in parts if isinstance(part, Mapping)]
            made.append({"role": "assistant", "content": None, "reasoning": "\n".join(texts)})
        else:
            raise InputError(
                f"{where} has an unknown type",
                remedy="Use message, function_call, function_call_output or reasoning",
                param=f"{where}.type",
            )
    return made


def _add_message(made: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    for name in item:
        if name not in ("type", "role", "content", "id", "status", "phase"):
            raise InputError(f"Unknown field {where}.{name[:80]}", param=f"{where}.{name[:80]}")
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    opened = made[-1] if made else {}
    if item.get("role") == "assistant" and "reasoning" in opened and opened["content"] is None:
        opened["content"] = content
        return
    made.append({"role": item.get("role"), "content": content})


def _assistant(made: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that a call belongs to."""
    if not made or made[-1]["role"] != "assistant":
        made.append({"role": "assistant", "content": None})
    return made[-1]


def _part(part: Any, where: str) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise InputError(f"{where} is not a content part", param=where)
    if part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    if part.get("type") in ("input_image", "input_file") and part.get("file_id") is not None:
        raise InputError(
            f"{where} names an uploaded file",
            why="this server keeps no files",
            remedy="Send image_url, file_url or file_data",
            param=f"{where}.file_id",
        )
    return {name: value for name, value in part.items() if name != "file_id"}
