"""The public prompt functions, with a processor and without."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from opsin.errors import InputError
from opsin.prompt.api import apply_chat_template, get_message_json
from opsin.prompt.formats import MessageFormat
from opsin.prompt.template import ChatTemplate

from . import templates

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text if p.type == 'text' else '<' ~ p.type ~ '>' }}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"
)


class Letters:
    """A tokenizer of letters."""

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(char) for char in text]


@dataclass
class Processor:
    """What the prompt functions ask of a processor."""

    family: Any
    chat_template: ChatTemplate | None
    tokenizer: Letters


def processor(fmt: str = "list_with_image_first", template: str | None = TEMPLATE) -> Processor:
    made = None if template is None else ChatTemplate.from_text(template, {"bos_token": "<s>"})
    return Processor(SimpleNamespace(message_format=fmt), made, Letters())


def messages_of(fmt: str, prompt: Any, **options: Any) -> Any:
    return apply_chat_template(processor(fmt), {}, prompt, return_messages=True, **options)


def kinds(message: Any) -> list[str]:
    return [part["type"] for part in message["content"]]


def test_a_string() -> None:
    text = apply_chat_template(processor(), {}, "Hi", num_images=2, num_audios=1)
    assert text == "[user]<image><image>Hi<audio>[go]"
    text = apply_chat_template(processor(), {}, "Hi", add_generation_prompt=False)
    assert text == "[user]Hi"


def test_media_go_into_the_first_user_message_only() -> None:
    prompt = [
        {"role": "system", "content": "s"},
        "one",
        {"role": "assistant", "content": "two"},
        SimpleNamespace(role="user", content="three"),
    ]
    made = messages_of("list_with_image_first", prompt, num_images=1, num_audios=1)
    assert [kinds(message) for message in made] == [
        ["text"],
        ["image", "text", "audio"],
        ["text"],
        ["text"],
    ]
    assert [message["role"] for message in made] == ["system", "user", "assistant", "user"]


def test_media_in_messages_keep_their_place() -> None:
    prompt = [
        {"role": "user", "content": "one"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
    ]
    for count in (0, 1):
        made = messages_of("list_with_image_first", prompt, num_images=count)
        assert [kinds(message) for message in made] == [["text"], ["text", "image"]]
    made = messages_of("list_with_image_first", prompt, num_images=3)
    assert [kinds(message) for message in made] == [["image", "image", "text"], ["text", "image"]]
    made = messages_of("list_with_image_first", prompt[1:], num_images=2)
    assert kinds(made[0]) == ["image", "text", "image"]


def test_numbers_follow_on_from_those_beside() -> None:
    prompt = ["one", {"content": [{"type": "image"}, {"type": "text", "text": "two"}]}]
    made = messages_of("numbered_image_tokens", prompt, num_images=3)
    assert [message["content"] for message in made] == [
        "<|image_1|><|image_2|>one",
        "<|image_3|>two",
    ]


def test_videos() -> None:
    made = messages_of("video_with_text", "Hi", video="a.mp4")
    assert made[0]["content"][0] == {
        "type": "video",
        "video": "a.mp4",
        "max_pixels": 224 * 224,
        "fps": 1,
    }
    made = messages_of("list_with_image", ["a", "b"], video=["a", "b"], fps=[1, 2], max_pixels=9)
    assert [part.get("fps") for part in made[0]["content"]] == [1, 2, None]
    assert kinds(made[1]) == ["text"]
    with pytest.raises(InputError, match="video"):
        messages_of("image_token", "Hi", video="a.mp4")


def test_media_need_a_user() -> None:
    with pytest.raises(InputError, match="no user message"):
        messages_of("image_token", {"role": "system", "content": "s"}, num_images=1)


@pytest.mark.parametrize("return_messages", [False, True])
def test_bare_prompts_are_the_last_message(return_messages: bool) -> None:
    made = apply_chat_template(
        processor("prompt_with_image_token", None),
        {},
        ["one", "two"],
        return_messages=return_messages,
        num_images=1,
    )
    assert made == "<image>two"


def test_without_a_template_there_is_a_transcript() -> None:
    plain = processor(template=None)
    assert apply_chat_template(plain, {}, "Hi", num_images=1) == "<image>Hi"
    prompt = ["Hi", {"role": "assistant", "content": "Ho"}, "So?"]
    assert apply_chat_template(plain, {}, prompt) == (
        "User: Hi\nAssistant: Ho\nUser: So?\nAssistant:"
    )


def test_variables_reach_the_template() -> None:
    source = "{{ bos_token }}{{ enable_thinking }}{{ tone }}{{ depth }}{{ tools | length }}"
    text = apply_chat_template(
        processor(template=source),
        {},
        "Hi",
        enable_thinking=False,
        chat_template_kwargs={"tone": "soft"},
        depth=3,
        tools=[{"a": 1}],
    )
    assert text == "<s>Falsesoft31"


def test_thinking_has_the_templates_default() -> None:
    source = "{{ enable_thinking is defined }}"
    assert apply_chat_template(processor(template=source), {}, "Hi") == "False"
    text = apply_chat_template(
        processor(template=source), {}, "Hi", chat_template_kwargs={"enable_thinking": False}
    )
    assert text == "True"


def test_a_template_of_the_callers() -> None:
    text = apply_chat_template(processor(), {}, "Hi", chat_template="{{ bos_token }}mine")
    assert text == "<s>mine"
    named = processor()
    named.chat_template = ChatTemplate({"default": "a", "rag": "b"})
    assert apply_chat_template(named, {}, "Hi", chat_template="rag") == "b"


def test_tokens() -> None:
    assert apply_chat_template(processor(template="ab"), {}, "Hi", tokenize=True) == [97, 98]


def test_tool_calls_travel() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    prompt = [
        {"role": "user", "content": "Call f"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
    ]
    text = apply_chat_template(processor("image_token", templates.CHATML_TOOLS), {}, prompt)
    assert '{"name": "f", "arguments": {"a": 1}}' in text
    assert "<tool_response>\n7\n</tool_response>" in text


def test_a_familys_name_is_enough() -> None:
    from opsin import families

    name = families.model_types()[0]
    fmt = MessageFormat(families.find(name).message_format)
    made = get_message_json(name.upper(), "Hi", num_images=1)
    assert ("image" in str(made)) or fmt.is_bare
    for config in ({"model_type": name}, SimpleNamespace(model_type=name)):
        listed = apply_chat_template(None, config, "Hi", return_messages=True, num_images=1)
        assert listed == (made if fmt.is_bare else [made])
    with pytest.raises(InputError, match="colour"):
        get_message_json(name, "Hi", colour=1)
    with pytest.raises(InputError, match="model_type"):
        apply_chat_template(None, {}, "Hi")
