"""Finding a checkpoint's templates, and rendering them as Transformers does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from opsin.errors import CheckpointError, InputError
from opsin.prompt.template import ChatTemplate, plain_value, template_kwargs

from . import templates

IMAGES = [
    {"type": "image"},
    {"type": "text", "text": " What <is> that & this? é 漢字 "},
    {"type": "video", "video": "a.mp4"},
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"b": [1, None], "a": "é<"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "é": 1.5}}}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <b>&</b>\n\n  there  "}],
    "turns": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning": "hm"},
        {"role": "user", "content": "So?"},
    ],
    "images": [{"role": "user", "content": IMAGES}],
    "tools": [
        {"role": "user", "content": "Call f"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "\nwhy\n"},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ],
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def theirs(source: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """What Transformers renders, or None if the template fails."""
    try:
        rendered, _ = render_jinja_template([messages], chat_template=source, **options)
    except (TemplateError, ValueError, TypeError):
        return None
    return rendered[0]


def ours(source: str, messages: list[dict[str, Any]], **options: Any) -> str | None:
    """What we render, or None if the template fails."""
    try:
        return ChatTemplate.from_text(source).render(messages, **options)
    except InputError:
        return None


@pytest.mark.parametrize("template", templates.ALL)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False, "tools": [TOOL], "enable_thinking": False},
        {"add_generation_prompt": True, "add_vision_id": True, "date_string": "today"},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
    ids=["plain", "tools", "options", "continue"],
)
def test_rendering_is_that_of_transformers(
    template: str, conversation: str, options: dict[str, Any]
) -> None:
    source, messages = templates.ALL[template], CONVERSATIONS[conversation]
    if template == "macro" and "continue_final_message" in options:
        pytest.skip("it writes a message twice, and Transformers then leaves its mark in the text")
    assert ours(source, messages, **TOKENS, **options) == theirs(
        source, messages, **TOKENS, **options
    )


def test_some_of_these_do_render() -> None:
    rendered = [
        theirs(source, messages, **TOKENS)
        for source in templates.ALL.values()
        for messages in CONVERSATIONS.values()
    ]
    assert sum(text is not None for text in rendered) >= 15


def test_messages_are_left_as_they_are() -> None:
    messages = json.loads(json.dumps(CONVERSATIONS["tools"]))
    options = {"add_generation_prompt": False, "continue_final_message": True}
    ChatTemplate.from_text(templates.CHATML_TOOLS).render(messages, **options)
    assert messages == CONVERSATIONS["tools"]


def test_a_templates_refusal_is_told_in_its_own_words() -> None:
    template = ChatTemplate.from_text(templates.ALTERNATING)
    with pytest.raises(InputError, match="Conversation roles must alternate user/assistant"):
        template.render([{"role": "assistant", "content": "Hi"}])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "not valid Jinja"),
        ("a\n{% endfor %}", "line 2"),
        ("{{ messages[0].x.y }}", "no attribute 'x'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception(cycler('a')) }}", "Cycler"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_a_broken_template_is_told(source: str, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        ChatTemplate.from_text(source).render([{"role": "user", "content": "Hi"}])
    assert "0x" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['sys'] }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(dict) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.x }}",
        "{{ lipsum.__globals__ }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    assert not ours(source, [{"role": "user", "content": "Hi"}])


def write(folder: Path, name: str, value: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def test_a_folder_without_templates(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None


def test_the_order_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": "config", "bos_token": "<s>"})
    assert ChatTemplate.from_folder(tmp_path).sources == {"default": "config"}
    write(tmp_path, "chat_template.jinja", "jinja")
    assert ChatTemplate.from_folder(tmp_path).sources == {"default": "jinja"}
    write(tmp_path, "additional_chat_templates/tool_use.jinja", "tools")
    found = ChatTemplate.from_folder(tmp_path)
    assert found.sources == {"default": "jinja", "tool_use": "tools"}
    assert found.variables == {"bos_token": "<s>"}
    write(tmp_path, "chat_template.json", {"chat_template": "json"})
    assert ChatTemplate.from_folder(tmp_path).sources == {"default": "json"}
    write(tmp_path, "processor_config.json", {"chat_template": "processor"})
    assert ChatTemplate.from_folder(tmp_path).sources == {"default": "processor"}


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    template = ChatTemplate.from_folder(tmp_path)
    assert template.render([]) == "plain"
    assert template.render([], tools=[TOOL]) == "tools"
    assert template.render([], tools=[TOOL], name="default") == "plain"
    with pytest.raises(InputError, match="default, tool_use"):
        template.render([], name="other")


def test_a_template_of_the_wrong_type(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", {"chat_template": [{"name": "default"}]})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        ChatTemplate.from_folder(tmp_path)
    write(tmp_path, "tokenizer_config.json", "{broken")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ChatTemplate.from_folder(tmp_path)


def test_special_tokens_reach_the_template(tmp_path: Path) -> None:
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": None,
        "image_token": "<img>",
        "extra_special_tokens": {"boi_token": "<boi>"},
        "chat_template": "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ boi_token }}",
    }
    write(tmp_path, "tokenizer_config.json", config)
    write(tmp_path, "special_tokens_map.json", {"eos_token": {"content": "</s>"}})
    assert ChatTemplate.from_folder(tmp_path).render([]) == "<s></s><img><boi>"
    write(tmp_path, "tokenizer_config.json", {**config, "added_tokens_decoder": {}})
    assert ChatTemplate.from_folder(tmp_path).render([]) == "<s>None<img><boi>".replace("None", "")


def test_what_a_user_gives(tmp_path: Path) -> None:
    write(tmp_path, "a.jinja", "{{ bos_token }}file")
    write(tmp_path, "a.json", {"chat_template": "{{ bos_token }}json"})
    write(tmp_path, "b.json", '"{{ bos_token }}string"')
    for given, text in [
        (str(tmp_path / "a.jinja"), "<s>file"),
        (tmp_path / "a.json", "<s>json"),
        (tmp_path / "b.json", "<s>string"),
        ("{{ bos_token }}literal", "<s>literal"),
    ]:
        assert ChatTemplate.from_user(given, TOKENS).render([]) == text
    with pytest.raises(InputError, match=r"nowhere\.jinja"):
        ChatTemplate.from_user("nowhere.jinja")


def test_media_objects_become_names() -> None:
    class Picture:
        pass

    value = {"image": Picture(), "data": b"x", "list": (1, True, None, 1.5)}
    assert plain_value(value) == {
        "image": "<Picture>",
        "data": "<bytes>",
        "list": [1, True, None, 1.5],
    }


def test_thinking_goes_by_the_templates_own_name() -> None:
    def switches(source: str, on: bool | None) -> dict[str, Any]:
        return template_kwargs(ChatTemplate.from_text(source), on)

    assert switches("{{ enable_thinking }}", None) == {}
    assert switches("{{ enable_thinking }}", True) == {"enable_thinking": True}
    assert switches("{{ thinking_mode }}", False)["thinking_mode"] == "disabled"
    assert switches("{{ thinking }}", True)["thinking"] is True


def test_a_prompt_cannot_both_continue_and_open() -> None:
    with pytest.raises(InputError, match="add_generation_prompt=False"):
        ChatTemplate.from_text("x").render([], continue_final_message=True)
    with pytest.raises(InputError, match="continue"):
        ChatTemplate.from_text("x").render(
            [{"role": "user", "content": "Hi"}],
            add_generation_prompt=False,
            continue_final_message=True,
        )
