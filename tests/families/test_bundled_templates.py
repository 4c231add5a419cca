"""The chat templates that come with the package, by name and by default."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opsin import families
from opsin.engine.processor import Processor
from opsin.errors import InputError
from opsin.prompt.api import tool_dialect
from opsin.prompt.template import ChatTemplate

from .checkpoints import Case
from .conftest import Lab
from .zoo import CASES

CALL = {
    "id": "a1b2c3d4e",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Bern"}},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
TOOL_TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Rain?"}]},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "dry"},
    {"role": "user", "content": "And now?"},
]
TOOLS_TEXT = '[{"type": "function", "function": {"name": "weather", "parameters": {}}}]'
GREETING = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. "
)


def rendered(name: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """What the bundled template of a name makes of messages."""
    source = families.bundled_template(name)
    assert source is not None
    return ChatTemplate.from_text(source).render(messages, **variables)


def test_vicuna_puts_pictures_first_and_closes_answers() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": "Sure?"},
    ]
    expected = f"{GREETING}USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert rendered("vicuna", messages, add_generation_prompt=True) == expected
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert rendered("vicuna", system, add_generation_prompt=False) == "Be kind. USER: Hi "


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "mistral_small_tool_call",
            '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern"}, "id": "a1b2c3d4e"}]',
        ),
        (
            "mistral_small_3_2_tool_call",
            '[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Bern"}',
        ),
    ],
)
def test_mistral_small_names_tools_before_the_last_question(name: str, call: str) -> None:
    expected = (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST][IMG]Rain?[/INST]"
        f"{call}</s>[TOOL_RESULTS]a1b2c3d4e[TOOL_CONTENT]dry[/TOOL_RESULTS]"
        f"[AVAILABLE_TOOLS]{TOOLS_TEXT}[/AVAILABLE_TOOLS][INST]And now?[/INST]"
    )
    assert rendered(name, TOOL_TURNS, tools=TOOLS, add_generation_prompt=True) == expected


def test_a_request_chooses_one_by_name(labs: Callable[[Case], Lab]) -> None:
    """Against the checkpoint's own, for one request, its tools included."""
    processor = labs(
        next(case for case in CASES if case.name == "llava-clip_default")
    ).ours.processor
    asked = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    own = processor.prepare(asked).text
    text = processor.prepare(asked, chat_template="vicuna").text
    assert text == "Be kind. USER: Hi ASSISTANT:"
    plain = processor.prepare(asked, chat_template="{{ messages[1].role }}!").text
    assert plain == "user!"
    with_tools = processor.prepare(asked, chat_template="mistral_small_tool_call", tools=TOOLS).text
    assert f"[AVAILABLE_TOOLS]{TOOLS_TEXT}[/AVAILABLE_TOOLS][INST]Hi[/INST]" in with_tools
    dialect = tool_dialect(processor, "mistral_small_tool_call")
    assert dialect is not None
    assert processor.prepare(asked).text == own
    with pytest.raises(InputError, match="vicuna"):
        processor.prepare(asked, chat_template="vicunna")


def test_names_lead_to_bundled_templates_only() -> None:
    assert {"vicuna", "mistral_small_tool_call"} <= set(families.bundled_templates())
    assert families.bundled_template("nothing_like_it") is None
    assert families.bundled_template("../data/vicuna") is None


def test_a_name_or_none_at_all_leads_to_vicuna(labs: Callable[[Case], Lab], tmp_path: Path) -> None:
    lab = labs(next(case for case in CASES if case.name == "llava-clip_default"))
    vicuna = families.bundled_template("vicuna")
    named = Processor.from_folder(lab.folder, chat_template="vicuna").chat_template
    assert named is not None
    assert named.source() == vicuna
    for file in lab.folder.iterdir():
        if file.name != "chat_template.json":
            (tmp_path / file.name).symlink_to(file)
    default = Processor.from_folder(tmp_path).chat_template
    assert default is not None
    assert default.source() == vicuna
