"""Which dialect a checkpoint speaks: by its chat template's own words, or by name."""

from collections.abc import Mapping

from opsin.errors import InputError
from opsin.prompt.tools import deepseek, gemma, json_list, mistral
from opsin.prompt.tools.dialect import Dialect
from opsin.prompt.tools.glm45 import KeysAndValues
from opsin.prompt.tools.hermes import Hermes
from opsin.prompt.tools.llama3_json import BareJson
from opsin.prompt.tools.pythonic import PythonList, ToolCode
from opsin.prompt.tools.qwen3_coder import TaggedParameters

DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Hermes(),
        TaggedParameters(),
        KeysAndValues(),
        BareJson(),
        PythonList(),
        ToolCode(),
        mistral.listed(),
        mistral.with_ids(),
        mistral.with_arguments(),
        gemma.pipe_marked(),
        gemma.escape_marked(),
        deepseek.fenced(),
        deepseek.plain(),
        json_list.marked_list(),
        json_list.open_list(),
        json_list.worded_list(),
    )
}

# What tells a dialect in a template: texts that must all be there. The most specific come first.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("gemma", ("<|tool_call>",)),
    ("functiongemma", ("<start_function_call>",)),
    ("deepseek_v3", (deepseek.ALL_START, "```json")),
    ("deepseek_v31", (deepseek.ALL_START,)),
    ("glm45", ("<tool_call>", "<arg_key>")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("mistral_call_id", ("[TOOL_CALLS]", "[CALL_ID]")),
    ("mistral_args", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("functools", ("functools[",)),
    ("granite", ("<|tool_call|>",)),
    ("phi4_mini", ("<|tool|>", "<|/tool|>")),
    ("hermes", ("<tool_call>", "</tool_call>")),
    ("tool_code", ("```tool_code",)),
    ("pythonic", ("[func_name1(",)),
    ("llama3_json", ('{"name": function name, "parameters": ',)),
    ("llama3_json", ("<|python_tag|>", '"parameters": ')),
    ("pythonic", ("<|python_start|>",)),
)


def dialect_for(chat_template: str | None) -> Dialect | None:
    """The dialect that a chat template asks its model to use, or None if it knows no tools."""
    if not chat_template or "tools" not in chat_template:
        return None
    for name, texts in _SIGNS:
        if all(text in chat_template for text in texts):
            return DIALECTS[name]
    return None


def dialect_named(name: str) -> Dialect:
    """The dialect of a name. Raises InputError."""
    if name not in DIALECTS:
        raise InputError(
            f"There is no tool-call dialect named {name[:80]!r}",
            remedy=f"One of {', '.join(DIALECTS)}",
            param="tool_call_parser",
        )
    return DIALECTS[name]
