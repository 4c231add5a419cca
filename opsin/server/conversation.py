"""Reads OpenAI's chat messages into ours, refusing by name what is not understood."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from opsin.errors import InputError
from opsin.prompt.messages import parse_messages
from opsin.types import Media, Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
# Fields of a message that reach the template, and those that clients echo back to no effect.
READ = ("role", "content", "name", "tool_calls", "tool_call_id")
REASONING = ("reasoning_content", "reasoning", "thinking")
ECHOED = ("refusal", "annotations", "audio", "function_call", "id", "images")
# Options of a media part. `detail` is a hint that changes nothing here: a picture keeps the size
# that the model takes, and the reply states it.
OPTIONS = {
    "image": ("detail",),
    "video": ("fps", "max_frames", "use_audio_in_video"),
    "audio": (),
    "document": ("detail", "dpi"),
}
DETAILS = ("auto", "low", "high", "original")
MAX_PARTS = 16_384


def conversation(
    messages: Sequence[Any], video: Mapping[str, Any] | None = None
) -> tuple[Message, ...]:
    """The messages of a chat request; `video` are settings (fps, ...) for its videos."""
    checked = [_checked(message, f"messages[{i}]") for i, message in enumerate(messages)]
    parts = sum(len(m["content"]) for m in checked if isinstance(m.get("content"), list))
    if parts > MAX_PARTS:
        raise InputError(
            f"The messages hold {parts} content parts",
            why=f"the limit is {MAX_PARTS}",
            param="messages",
        )
    parsed = parse_messages(checked)
    for i, message in enumerate(parsed):
        for media in message.media:
            _check_source(media, f"messages[{i}].content")
    return tuple(_with_video(message, video) for message in parsed) if video else parsed


def _checked(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"{where} is not an object", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise InputError(
            f"{where}.role is {str(role)[:40]!r}" if role is not None else f"{where} has no role",
            remedy=f"Use one of {', '.join(ROLES)}",
            param=f"{where}.role",
        )
    for name, value in message.items():
        if name not in READ and name not in REASONING:
            _check_echoed(name, value, where)
    kept = {name: message[name] for name in (*READ, *REASONING) if message.get(name) is not None}
    kept["role"] = ROLES[role]
    for name in (*REASONING, "name", "tool_call_id"):
        if not isinstance(kept.get(name, ""), str):
            raise InputError(f"{where}.{name} is not a string", param=f"{where}.{name}")
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], f"{where}.tool_calls")
    elif "content" not in kept and role != "assistant":
        raise InputError(f"{where}.content is missing", param=f"{where}.content")
    return kept


def _check_echoed(name: str, value: Any, where: str) -> None:
    """Replies come back with fields that say nothing: let those pass, and no other."""
    if name in ECHOED and (value is None or name in ("id", "images", "annotations", "refusal")):
        return
    raise InputError(
        f"Unknown field {where}.{name[:80]}", remedy="Leave it out", param=f"{where}.{name[:80]}"
    )


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Earlier tool calls with their arguments as objects, which is what templates write out."""
    if not isinstance(calls, list):
        raise InputError(f"{where} is not a list", param=where)
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where} has no function name", param=f"{where}.function.name")
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        place = f"{where}.function.arguments"
        raise InputError(f"{place} is not a JSON object", param=place)
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _check_source(media: Media, where: str) -> None:
    """A request names media by text alone: a path, a URL or base64."""
    if not isinstance(media.source, str) or not media.source.strip():
        raise InputError(
            f"{where} holds {media.kind} without a source",
            remedy='Give "url" or "data" as a string',
            param=where,
        )
    for name, value in media.options.items():
        if name not in OPTIONS[media.kind]:
            raise InputError(f"Unknown field {where}.{name[:80]}", param=f"{where}.{name[:80]}")
        if name == "detail" and value not in DETAILS:
            raise InputError(
                f"{where} has an unknown detail", remedy=f"Use {', '.join(DETAILS)}", param=where
            )
        if name == "use_audio_in_video" and isinstance(value, bool):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name != "detail" and not (number and 0 < value <= 100_000):
            raise InputError(f"{where}.{name} must be above zero", param=f"{where}.{name}")


def _with_video(message: Message, video: Mapping[str, Any]) -> Message:
    content = tuple(
        replace(part, options={**video, **part.options})
        if isinstance(part, Media) and part.kind == "video"
        else part
        for part in message.content
    )
    return replace(message, content=content)
