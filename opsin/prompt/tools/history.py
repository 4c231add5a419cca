"""Earlier calls and their results in the form that chat templates read."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def each_function(
    messages: Sequence[Mapping[str, Any]],
    change: Callable[[dict[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """The conversation with every earlier call's function (name, arguments) changed."""
    return [_with_calls(message, change) for message in messages]


def with_argument_objects(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The arguments of earlier calls as objects, where templates go through their keys.

    Clients send them as JSON text. Text that holds no object stays text.
    """
    return each_function(messages, _with_object)


def _with_calls(
    message: Mapping[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return dict(message)
    return {**message, "tool_calls": [_with_function(call, change) for call in calls]}


def _with_function(call: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    return {**call, "function": change(dict(call["function"]))}


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return function
    return {**function, "arguments": value} if isinstance(value, dict) else function
