"""What each message format produces, from counts and from typed messages."""

import pytest

from opsin.errors import InputError
from opsin.prompt.formats import (
    MediaCounter,
    MessageFormat,
    VideoOptions,
    format_text,
    message_dict,
    plain_prompt,
)
from opsin.types import Media, Message, Text

TEXT = {"type": "text", "text": "Hi", "content": "Hi"}
IMAGE = {"type": "image"}
AUDIO = {"type": "audio"}
LISTS = [fmt for fmt in MessageFormat if fmt.is_list]
TOKENS = [fmt for fmt in MessageFormat if not fmt.is_list and not fmt.is_bare]
BARE = [fmt for fmt in MessageFormat if fmt.is_bare]


def test_the_values_are_the_contract() -> None:
    assert {fmt.value for fmt in MessageFormat} == {
        "list_with_image",
        "list_with_image_first",
        "list_with_image_url_first",
        "list_with_image_type",
        "list_with_image_type_text",
        "list_with_image_type_text_image_last",
        "image_token",
        "image_token_pipe",
        "start_image_token",
        "image_token_newline",
        "numbered_image_tokens",
        "prompt_only",
        "prompt_with_image_token",
        "prompt_with_start_image_token",
        "video_with_text",
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list_with_image", [TEXT, IMAGE, IMAGE, AUDIO]),
        ("list_with_image_first", [IMAGE, IMAGE, TEXT, AUDIO]),
        ("list_with_image_url_first", [{"type": "image_url"}, {"type": "image_url"}, TEXT, AUDIO]),
        ("list_with_image_type", [IMAGE, IMAGE, TEXT, AUDIO]),
        ("list_with_image_type_text", [IMAGE, IMAGE, TEXT, AUDIO]),
        ("list_with_image_type_text_image_last", [TEXT, IMAGE, IMAGE, AUDIO]),
        ("image_token", "<|audio_1|><image><image>Hi"),
        ("image_token_pipe", "<|audio_1|><|image|><|image|>Hi"),
        ("start_image_token", "<|audio_1|>Hi<start_of_image><start_of_image>"),
        ("image_token_newline", "<|audio_1|><image>\n<image>\nHi"),
        ("numbered_image_tokens", "<|image_1|><|image_2|><|audio_1|>Hi"),
        ("video_with_text", [IMAGE, IMAGE, TEXT, AUDIO]),
    ],
)
def test_a_user_message_with_media(name: str, content: object) -> None:
    made = format_text(MessageFormat(name), "Hi", num_images=2, num_audios=1)
    assert made == {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("prompt_only", "Hi"),
        ("prompt_with_image_token", "<image><image>Hi"),
        ("prompt_with_start_image_token", "Hi<start_of_image><start_of_image>"),
    ],
)
def test_a_bare_prompt(name: str, prompt: str) -> None:
    assert format_text(MessageFormat(name), "Hi", num_images=2) == prompt
    assert format_text(MessageFormat(name), "Hi", num_images=2, skip_image_token=True) == "Hi"


@pytest.mark.parametrize("fmt", LISTS + TOKENS)
@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_users_get_placeholders(fmt: MessageFormat, role: str) -> None:
    made = format_text(fmt, "Hi", role, num_images=1, num_audios=1)
    assert isinstance(made, dict)
    assert made["role"] == role
    assert made["content"] in ("Hi", [TEXT])


@pytest.mark.parametrize("fmt", LISTS + TOKENS)
def test_placeholders_can_be_left_out(fmt: MessageFormat) -> None:
    made = format_text(
        fmt, "Hi", num_images=1, num_audios=1, skip_image_token=True, skip_audio_token=True
    )
    assert isinstance(made, dict)
    assert made["content"] in ("Hi", [TEXT])


def test_typed_formats_write_the_assistant_as_text() -> None:
    for name in ("list_with_image_type", "list_with_image_type_text"):
        assert format_text(MessageFormat(name), "Hi", "assistant")["content"] == "Hi"
    assert format_text(MessageFormat.LIST_WITH_IMAGE, "Hi", "assistant")["content"] == [TEXT]


@pytest.mark.parametrize("fmt", LISTS)
def test_videos_keep_the_other_media(fmt: MessageFormat) -> None:
    made = format_text(fmt, "Hi", num_images=1, num_audios=1, videos=VideoOptions(["a.mp4", "b"]))
    assert isinstance(made, dict)
    kinds = [part["type"] for part in made["content"]]
    assert kinds[1:] == ["video", "video", "audio", "text"]
    assert made["content"][1] == {
        "type": "video",
        "video": "a.mp4",
        "max_pixels": 224 * 224,
        "fps": 1,
    }


@pytest.mark.parametrize("fmt", TOKENS + BARE)
def test_a_video_is_never_dropped(fmt: MessageFormat) -> None:
    with pytest.raises(InputError, match="video"):
        format_text(fmt, "Hi", videos=VideoOptions(["a.mp4"]))
    with pytest.raises(InputError, match="video"):
        message_dict(fmt, Message("user", (Media("video", "a.mp4"),)))


def test_each_video_has_a_rate() -> None:
    assert [part["fps"] for part in VideoOptions(["a", "b"], fps=[1, 2]).parts] == [1, 2]
    with pytest.raises(InputError, match="3 fps values for 2 videos"):
        VideoOptions(["a", "b"], fps=[1, 2, 3])


def test_typed_messages_keep_the_reading_order() -> None:
    parts = (Text("one"), Media("image", "a"), Text("two"), Media("audio", "b"), Text("three"))
    message = Message("user", parts)
    listed = message_dict(MessageFormat.LIST_WITH_IMAGE_FIRST, message)
    assert [part["type"] for part in listed["content"]] == [
        "text",
        "image",
        "text",
        "audio",
        "text",
    ]
    assert (
        message_dict(MessageFormat.IMAGE_TOKEN_NEWLINE, message)["content"]
        == "one<image>\ntwo<|audio_1|>three"
    )
    two_texts = Message("user", (Text("one"), Text("two")))
    assert message_dict(MessageFormat.IMAGE_TOKEN, two_texts)["content"] == "one\ntwo"


def test_numbers_run_through_the_conversation() -> None:
    counter = MediaCounter()
    message = Message("user", (Media("image", "a"), Text("x")))
    fmt = MessageFormat.NUMBERED_IMAGE_TOKENS
    assert message_dict(fmt, message, counter)["content"] == "<|image_1|>x"
    assert message_dict(fmt, message, counter)["content"] == "<|image_2|>x"


def test_bytes_never_reach_a_template() -> None:
    for source in (b"\0" * 100, "data:video/mp4;base64,AAAA"):
        message = Message("user", (Media("video", source, {"fps": 2}),))
        made = message_dict(MessageFormat.LIST_WITH_IMAGE, message)
        assert made["content"] == [{"type": "video", "video": "<video>", "fps": 2}]


def test_tool_messages_are_text_and_their_arguments_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    asked = Message("assistant", (), {"tool_calls": [call]})
    answered = Message("tool", (Text("42"),), {"tool_call_id": "1"})
    fmt = MessageFormat.LIST_WITH_IMAGE_FIRST
    made = message_dict(fmt, asked)
    assert made["content"] == ""
    assert made["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert call["function"]["arguments"] == '{"a": 1}'
    assert message_dict(fmt, answered) == {"role": "tool", "content": "42", "tool_call_id": "1"}


def test_arguments_that_are_no_json_stay_text() -> None:
    call = {"function": {"name": "f", "arguments": "{broken"}}
    made = message_dict(MessageFormat.IMAGE_TOKEN, Message("assistant", (), {"tool_calls": [call]}))
    assert made["tool_calls"] == [call]


def test_a_transcript_without_a_template() -> None:
    one = [{"role": "user", "content": [IMAGE, TEXT]}]
    assert plain_prompt(one, True) == "<image>Hi"
    two = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert plain_prompt(two, True) == "System: Be kind.\nUser: Hi\nAssistant:"
    assert plain_prompt(two, False) == "System: Be kind.\nUser: Hi"
