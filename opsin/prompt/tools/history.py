"""Earlier calls and their results in the form that chat templates read.

Conversations come in OpenAI's form: arguments are JSON text, results name their call by its id.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opsin.prompt.tools.typed_values import loads

_SHORT = 9
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

# A template that writes arguments down as they are wants text; one that asks for their type, goes
# through them or turns them into JSON itself wants an object.
_AS_TEXT = re.compile(r"arguments['\"]?\]?\s{0,4}(?:\+|~|-?\}\})")
_AS_OBJECT = re.compile(r"arguments['\"]?\]?\)?\s{0,4}(?:\||\.items|\[|%\}|-%\}|is\b)")


def prepared(messages: Sequence[Mapping[str, Any]], template: str | None) -> list[dict[str, Any]]:
    """The conversation with arguments as the template takes them, and results that say whose."""
    takes_text = template is not None and takes_argument_text(template)
    change = _with_text if takes_text else _with_object
    return with_result_names([_with_functions(message, change) for message in messages])


def takes_argument_text(template: str) -> bool:
    """Whether a chat template writes the arguments of calls down as the text that they are."""
    return bool(_AS_TEXT.search(template)) and not _AS_OBJECT.search(template)


def with_result_names(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Results with the name of the function that was called, where they do not say it."""
    names: dict[Any, str] = {}
    found: list[dict[str, Any]] = []
    for message in messages:
        for call in _calls(message):
            function = call.get("function")
            if isinstance(function, Mapping) and isinstance(call.get("id"), str):
                names[call["id"]] = str(function.get("name", ""))
        named = dict(message)
        call_id = message.get("tool_call_id")
        if message.get("role") == "tool" and isinstance(call_id, str) and call_id in names:
            named.setdefault("name", names[call_id])
        found.append(named)
    return found


def with_short_ids(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ids of calls as nine letters and digits; the same id stays the same."""
    found: list[dict[str, Any]] = []
    for message in messages:
        changed = dict(message)
        if isinstance(message.get("tool_call_id"), str):
            changed["tool_call_id"] = short_id(message["tool_call_id"])
        if _calls(message):
            changed["tool_calls"] = [
                {**call, "id": short_id(str(call.get("id") or index))}
                for index, call in enumerate(_calls(message))
            ]
        found.append(changed)
    return found


def short_id(text: str) -> str:
    """An id of nine letters and digits for an id of any form."""
    if _SHORT_ID.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return "".join(_DIGITS[byte % len(_DIGITS)] for byte in digest[:_SHORT])


def with_single_calls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Calls that were made together as one after the other, each followed by its results.

    For templates that take one call a message.
    """
    found: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for message in messages:
        if message.get("role") == "tool":
            results.append(dict(message))
            continue
        found += _answered(calls, results)
        results = []
        each: list[Mapping[str, Any] | None] = [*_calls(message)]
        calls = [
            {**message, "tool_calls": [call]} if call else dict(message) for call in each or [None]
        ]
        for later in calls[1:]:
            later["content"] = ""
    return found + _answered(calls, results)


def _answered(calls: list[dict[str, Any]], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a call each, with the results that name them behind, and then the other ones."""
    by_call: dict[Any, list[dict[str, Any]]] = {}
    for result in results:
        by_call.setdefault(str(result.get("tool_call_id")), []).append(result)
    found: list[dict[str, Any]] = []
    for message in calls:
        found.append(message)
        for call in _calls(message):
            found += by_call.pop(str(call.get("id")), [])
    return found + [result for group in by_call.values() for result in group]


def with_calls_in_text(
    messages: Sequence[Mapping[str, Any]], write: Callable[[list[dict[str, Any]]], str]
) -> list[dict[str, Any]]:
    """Earlier calls (name, arguments) as text of their message, for templates that know none."""
    found: list[dict[str, Any]] = []
    for message in messages:
        changed = dict(message)
        functions = [call.get("function") for call in _calls(message)]
        calls = [_with_object(dict(each)) for each in functions if isinstance(each, Mapping)]
        if calls:
            del changed["tool_calls"]
            changed["content"] = _with_more_text(message.get("content"), write(calls))
        found.append(changed)
    return found


def _with_more_text(content: Any, text: str) -> Any:
    if isinstance(content, list | tuple):
        return [*content, {"type": "text", "text": text}]
    return (content or "") + text


def _calls(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return []
    return [call for call in calls if isinstance(call, Mapping)]


def _with_functions(
    message: Mapping[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    calls = _calls(message)
    if not calls:
        return dict(message)
    return {**message, "tool_calls": [_with_function(call, change) for call in calls]}


def _with_function(
    call: Mapping[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return dict(call)
    return {**call, "function": change(dict(function))}


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object; text that holds none stays text."""
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    value, _ = loads(arguments or "{}")
    return {**function, "arguments": value} if isinstance(value, dict) else function


def _with_text(function: dict[str, Any]) -> dict[str, Any]:
    """Arguments as JSON text."""
    arguments = function.get("arguments")
    if isinstance(arguments, str) or arguments is None:
        return {**function, "arguments": arguments or "{}"}
    return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
