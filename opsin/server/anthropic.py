"""Anthropic's Messages: a body to a request, deltas to events or to one message."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from opsin.engine.asked import response_form
from opsin.engine.form import Wanted
from opsin.errors import InputError
from opsin.prompt.tools.dialect import Tool
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
from opsin.server.request import Answer, Delta, Head, Request
from opsin.types import Constraint, Timings, Usage

VIDEO_OPTIONS = ("fps", "max_frames", "use_audio_in_video")
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class OutputConfig(Body):
    """How the answer is written."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonObject | None = None


class Thinking(Body):
    """Whether the model thinks first, and for how long."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted"] | None = None


class CountBody(SamplingFields, PromptFields):
    """What is counted: all that becomes part of the prompt."""

    model: Annotated[str, Field(max_length=512)] = "default"
    messages: Annotated[list[JsonObject], Field(min_length=1, max_length=MAX_MESSAGES)]
    system: str | list[JsonObject] | None = None
    tools: Annotated[list[JsonObject], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: JsonObject | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: JsonObject | None = None  # a hint for a vendor's cache; ours needs none


class MessageBody(CountBody):
    """The body of a message request; metadata, service_tier and ids change no answer."""

    max_tokens: Count
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    metadata: JsonObject | None = None
    service_tier: str | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


def parse(body: bytes, bounds: Bounds) -> Request:
    """The request that a body makes."""
    fields = validated(MessageBody, body)
    return _request(
        fields, bounds, fields.max_tokens, fields.stop_sequences, stream=bool(fields.stream)
    )


def parse_count(body: bytes, bounds: Bounds) -> Request:
    """The request whose prompt is to be counted."""
    return _request(validated(CountBody, body), bounds, 1, None, stream=False)


def _request(
    fields: CountBody, bounds: Bounds, max_tokens: int, stop: list[str] | None, *, stream: bool
) -> Request:
    tools = tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(fields.tools or ()))
    choice, parallel = _tool_choice(fields.tool_choice, tools)
    thinking = fields.thinking
    if thinking is not None and fields.enable_thinking is None:
        fields.enable_thinking = thinking.type == "enabled" or None
        if thinking.type == "disabled":
            fields.enable_thinking = False
    effort = fields.output_config.effort if fields.output_config else None
    request = Request(
        model=fields.model,
        messages=conversation(_messages(fields), video_fields(fields)),
        sampling=sampling(fields, max_tokens=max_tokens, stop=stop),
        template=template_fields(fields, effort),
        processor=processor_fields(fields),
        wanted=Wanted(tools, choice, parallel, _form(fields.output_config)),
        thinking_budget=thinking.budget_tokens if thinking else fields.thinking_budget,
        task=fields.task,
        salt=fields.cache_salt or "",
        stream=stream,
    )
    openai_chat.check(request, bounds)
    return request


def _form(config: OutputConfig | None) -> Constraint | None:
    held = config.format if config else None
    return None if held is None else response_form(held, "output_config.format")


def _tool(tool: Mapping[str, Any], where: str) -> Tool:
    name = tool.get("name")
    if tool.get("type", "custom") != "custom" or not isinstance(name, str) or not name:
        raise InputError(f"{where} is not a tool of the client's own", param=where)
    schema = tool.get("input_schema") or {}
    if not isinstance(schema, Mapping):
        raise InputError(f"{where}.input_schema is not a JSON schema", param=where)
    return Tool(name, str(tool.get("description") or ""), schema, bool(tool.get("strict")))


def _tool_choice(choice: Mapping[str, Any] | None, tools: Sequence[Tool]) -> tuple[str, bool]:
    if choice is None:
        return "auto", True
    parallel = choice.get("disable_parallel_tool_use") is not True
    kinds = {"auto": "auto", "any": "required", "none": "none"}
    kind = choice.get("type")
    if kind == "tool" and choice.get("name") in {tool.name for tool in tools}:
        return f"={choice['name']}", parallel
    if kind not in kinds or (kind == "any" and not tools):
        raise InputError("tool_choice names no tool of the request", param="tool_choice")
    return kinds[str(kind)], parallel


# Messages: rewritten as OpenAI's, which `conversation` reads and checks.


def _messages(fields: CountBody) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    if fields.system is not None:
        made.append({"role": "system", "content": _system(fields.system)})
    for i, message in enumerate(fields.messages):
        where = f"messages[{i}]"
        role = message.get("role")
        if role not in ("user", "assistant"):
            raise InputError(
                f"{where}.role is not known", remedy="Use user or assistant", param=f"{where}.role"
            )
        for name in message:
            if name not in ("role", "content"):
                raise InputError(f"Unknown field {where}.{name[:80]}", param=f"{where}.{name[:80]}")
        made += _split_message(str(role), message.get("content"), f"{where}.content")
    return made


def _system(system: str | list[JsonObject]) -> str:
    if isinstance(system, str):
        return system
    texts = [block.get("text") for block in system if block.get("type") == "text"]
    if len(texts) != len(system) or not all(isinstance(text, str) for text in texts):
        raise InputError("system holds something else than text", param="system")
    return "\n".join(str(text) for text in texts)


def _split_message(role: str, content: Any, where: str) -> list[dict[str, Any]]:
    """One message as one or, where it holds tools' results, several of OpenAI's."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise InputError(f"{where} is neither text nor a list of blocks", param=where)
    results: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for i, block in enumerate(content):
        place = f"{where}[{i}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result":
            results.append(_tool_result(block, place))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        else:
            parts.append(_part(block, place))
    message: dict[str, Any] = {"role": role, "content": parts}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return [*results, message] if parts or calls or not results else results


def _tool_result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content") or ""
    if isinstance(content, list):
        content = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def _part(block: Any, where: str) -> dict[str, Any]:
    """A text, image, document or video block as OpenAI writes it; videos are ours."""
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind == "text" and isinstance(block.get("text"), str):
        return {"type": "text", "text": block["text"]}
    source = block.get("source") if isinstance(block, Mapping) else None
    if kind in ("image", "document", "video") and isinstance(source, Mapping):
        form = source.get("type")
        if kind == "document" and form == "text" and isinstance(source.get("data"), str):
            return {"type": "text", "text": source["data"]}
        if kind == "document":
            return _document(block, source, where)
        url = _url(source, "image/png" if kind == "image" else "video/mp4")
        if url is not None:
            options = {name: block[name] for name in VIDEO_OPTIONS if name in block}
            own = options if kind == "video" else {}
            return {"type": f"{kind}_url", f"{kind}_url": {"url": url}, **own}
    raise _unreadable(where)


def _url(source: Mapping[str, Any], usual: str) -> str | None:
    """Where a source is, or the source itself, as one URL; None if it is of no known kind."""
    form = source.get("type")
    if form == "base64" and isinstance(source.get("data"), str):
        return f"data:{source.get('media_type') or usual};base64,{source['data']}"
    if form == "url" and isinstance(source.get("url"), str):
        return str(source["url"])
    return None


def _document(block: Mapping[str, Any], source: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A PDF document block as OpenAI writes a file."""
    citations = block.get("citations")
    if isinstance(citations, Mapping) and citations.get("enabled"):
        raise InputError(
            f"{where}.citations cannot be used",
            why="no model here cites",
            remedy="Leave it out",
            param=f"{where}.citations",
        )
    url = _url(source, "application/pdf")
    if url is None:
        raise _unreadable(where)
    name = "file_data" if source.get("type") == "base64" else "file_url"
    return {"type": "file", "file": {name: url}}


def _unreadable(where: str) -> InputError:
    return InputError(
        f"{where} is a block that cannot be read here",
        remedy="Send text, image, document or video (base64 or url), tool_use or tool_result",
        param=where,
    )


# Replies.


def stop_reason(answer: Answer | Delta) -> str:
    """Why an answer ended, in Anthropic's words."""
    if answer.stop_string is not None:
        return "stop_sequence"
    return STOP_REASONS.get(answer.finish_reason or "stop", "end_turn")


def usage(held: Usage) -> dict[str, int]:
    """Token counts; unlike OpenAI's, the input's leave out what the cache held."""
    return {
        "input_tokens": held.prompt_tokens - held.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": held.cached_tokens,
        "output_tokens": held.generation_tokens,
    }


def _shell(head: Head) -> dict[str, Any]:
    return {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def render(head: Head, answer: Answer) -> dict[str, Any]:
    """The reply to a request that does not stream."""
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.text:
        content.append({"type": "text", "text": answer.text})
    content += [
        {
            "type": "tool_use",
            "id": call.id,
            "name": call.name,
            "input": _arguments(call.arguments),
        }
        for call in answer.tool_calls
    ]
    return {
        **_shell(head),
        "content": content,
        "stop_reason": stop_reason(answer),
        "stop_sequence": answer.stop_string,
        "usage": usage(answer.usage),
        "regions": list(answer.regions),
        **_measured(answer),
    }


def _measured(answer: Answer | Delta) -> dict[str, Any]:
    """What goes beyond the protocol: where the time went, and how large media were seen."""
    return {
        "timings": openai_chat.timings(answer.timings or Timings()),
        "images": openai_chat.images(answer),
        **openai_chat.video_frames(answer),
    }


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; those that are no object, as when they were cut short, as text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": text}


class EventRenderer:
    """Deltas to the events of one stream: one content block open at a time."""

    def __init__(self, head: Head, prompt_tokens: int) -> None:
        self.head = head
        self.prompt_tokens = prompt_tokens
        self.index = -1
        self.open: str | None = None  # "thinking", "text", or "tool_use" with the call's number
        self.last = Delta()

    def opening(self) -> list[dict[str, Any]]:
        """The message without its content."""
        message = {**_shell(self.head), "usage": usage(Usage(self.prompt_tokens))}
        return [{"type": "message_start", "message": message}]

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """The events that a delta makes."""
        events: list[dict[str, Any]] = []
        if delta.reasoning:
            events += self._switch(
                "thinking", {"type": "thinking", "thinking": "", "signature": ""}
            )
            events.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.text:
            events += self._switch("text", {"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": delta.text}))
        for call in delta.tool_calls:
            block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
            events += self._switch(f"tool_use {call.index}", block)
            if call.arguments:
                piece = {"type": "input_json_delta", "partial_json": call.arguments}
                events.append(self._delta(piece))
        if delta.finish_reason is not None:
            self.last = delta
        return events

    def closing(self) -> list[dict[str, Any]]:
        """The end of the open block, and why the message ended."""
        held = self.last.usage or Usage(self.prompt_tokens)
        ended: dict[str, Any] = {
            "stop_reason": stop_reason(self.last),
            "stop_sequence": self.last.stop_string,
        }
        if self.last.regions:
            ended["regions"] = list(self.last.regions)
        return [
            *self._stop(),
            {
                "type": "message_delta",
                "delta": ended,
                "usage": usage(held),
                **_measured(self.last),
            },
            {"type": "message_stop"},
        ]

    def _switch(self, kind: str, block: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Open a block of another kind, after closing the one before it."""
        if kind == self.open:
            return []
        stopped = self._stop()
        self.open = kind
        self.index += 1
        started = {"type": "content_block_start", "index": self.index, "content_block": block}
        return [*stopped, started]

    def _stop(self) -> list[dict[str, Any]]:
        if self.open is None:
            return []
        events = []
        if self.open == "thinking":
            events.append(self._delta({"type": "signature_delta", "signature": ""}))
        self.open = None
        return [*events, {"type": "content_block_stop", "index": self.index}]

    def _delta(self, delta: Mapping[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self.index, "delta": delta}
