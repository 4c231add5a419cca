"""The same two calls as each dialect writes them, and readers' events made comparable."""

import json
from collections.abc import Iterable

from opsin.prompt.tools.dialect import (
    CallArguments,
    CallEnd,
    CallStart,
    Dialect,
    TextPiece,
    Tool,
    ToolEvent,
)

TOOLS = (
    Tool(
        "get_weather",
        "The weather of a city",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"enum": ["c", "f"]},
                "opts": {
                    "type": "object",
                    "properties": {"x": {"type": "array", "items": {"type": "number"}}},
                },
            },
            "required": ["city"],
        },
    ),
    Tool("now", "The time"),
)

WEATHER = {"city": 'Par"is\n', "days": 3, "unit": "c", "opts": {"x": [1, 2.5]}}
_JSON = json.dumps(WEATHER)
_OBJECT = f'{{"name": "get_weather", "arguments": {_JSON}}}'
_NOW = '{"name": "now", "arguments": {}}'


def wide(text: str) -> str:
    """Markers with wide bars."""
    return text.replace("|", "\uff5c")


# name -> two calls: get_weather with WEATHER, and now without arguments.
SAMPLES = {
    "hermes": f"<tool_call>\n{_OBJECT}\n</tool_call>\n<tool_call>\n{_NOW}\n</tool_call>",
    "qwen3_coder": (
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nPar"is\n\n</parameter>\n'
        "<parameter=days>\n3\n</parameter>\n<parameter=unit>\nc\n</parameter>\n"
        '<parameter=opts>\n{"x": [1, 2.5]}\n</parameter>\n</function>\n</tool_call>\n'
        "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    ),
    "glm45": (
        '<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Par"is\n</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
        "<arg_key>unit</arg_key>\n<arg_value>c</arg_value>\n"
        '<arg_key>opts</arg_key>\n<arg_value>{"x": [1, 2.5]}</arg_value>\n</tool_call>\n'
        "<tool_call>now\n</tool_call>"
    ),
    "llama3_json": f"{_OBJECT}; {_NOW}".replace("arguments", "parameters"),
    "pythonic": (
        '[get_weather(city="Par\\"is\\n", days=3, unit="c", opts={"x": [1, 2.5]}), now()]'
    ),
    "tool_code": (
        "```tool_code\n"
        'get_weather(city="Par\\"is\\n", days=3, unit="c", opts={"x": [1, 2.5]})\nnow()\n```'
    ),
    "mistral": f"[TOOL_CALLS][{_OBJECT}, {_NOW}]",
    "mistral_call_id": (
        f"[TOOL_CALLS]get_weather[CALL_ID]abcdefgh1[ARGS]{_JSON}"
        "[TOOL_CALLS]now[CALL_ID]abcdefgh2[ARGS]{}"
    ),
    "mistral_args": f"[TOOL_CALLS]get_weather[ARGS]{_JSON}[TOOL_CALLS]now[ARGS]{{}}",
    "gemma": (
        '<|tool_call>call:get_weather{city:<|"|>Par"is\n<|"|>,days:3,unit:<|"|>c<|"|>,'
        "opts:{x:[1,2.5]}}<tool_call|><|tool_call>call:now{}<tool_call|>"
    ),
    "functiongemma": (
        '<start_function_call>call:get_weather{city:<escape>Par"is\n<escape>,days:3,'
        "unit:<escape>c<escape>,opts:{x:[1,2.5]}}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call>"
    ),
    "deepseek_v3": wide(
        "<|tool▁calls▁begin|><|tool▁call▁begin|>function<|tool▁sep|>get_weather\n"
        f"```json\n{_JSON}\n```<|tool▁call▁end|>\n"
        "<|tool▁call▁begin|>function<|tool▁sep|>now\n```json\n{}\n```<|tool▁call▁end|>"
        "<|tool▁calls▁end|>"
    ),
    "deepseek_v31": wide(
        f"<|tool▁calls▁begin|><|tool▁call▁begin|>get_weather<|tool▁sep|>{_JSON}"
        "<|tool▁call▁end|><|tool▁call▁begin|>now<|tool▁sep|>{}<|tool▁call▁end|>"
        "<|tool▁calls▁end|>"
    ),
    "phi4_mini": f"<|tool_call|>[{_OBJECT}, {_NOW}]<|/tool_call|>",
    "granite": f"<|tool_call|>[{_OBJECT}, {_NOW}]",
    "functools": f"functools[{_OBJECT}, {_NOW}]",
}

# Dialects that call only at the start of an answer, or of a line.
AT_THE_START = ("llama3_json", "pythonic")


def joined(events: Iterable[ToolEvent]) -> list[ToolEvent]:
    """The events with neighbouring pieces of text and of arguments put together."""
    found: list[ToolEvent] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, TextPiece) and isinstance(last, TextPiece):
            found[-1] = TextPiece(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments):
            found[-1] = CallArguments(event.index, last.fragment + event.fragment)
        else:
            found.append(event)
    return found


def read(
    dialect: Dialect, text: str, sizes: Iterable[int] = (), tools: Iterable[Tool] = TOOLS
) -> list[ToolEvent]:
    """The events of a text, fed in pieces of these sizes and then the rest."""
    reader = dialect.reader(tuple(tools))
    events: list[ToolEvent] = []
    for size in sizes:
        events += reader.feed(text[:size])
        text = text[size:]
    events += reader.feed(text)
    return joined(events + reader.finish())


def call(index: int, name: str, arguments: str) -> list[ToolEvent]:
    """The events of one whole call."""
    pieces = [CallArguments(index, arguments)] if arguments else []
    return [CallStart(index, name), *pieces, CallEnd(index)]
