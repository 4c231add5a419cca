"""Every accepted way of writing a conversation."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from opsin.errors import InputError
from opsin.prompt.messages import parse_messages
from opsin.types import Media, Message, Text


def part(value: Any) -> Any:
    (message,) = parse_messages({"role": "user", "content": [value]})
    return message.content[0]


def test_strings_dicts_objects_and_messages() -> None:
    @dataclass
    class Turn:
        role: str
        content: str

    typed = Message("user", (Text("d"),))
    prompt = ["a", {"role": "system", "content": "b"}, Turn("assistant", "c"), typed]
    assert parse_messages(prompt) == (
        Message("user", (Text("a"),)),
        Message("system", (Text("b"),)),
        Message("assistant", (Text("c"),)),
        typed,
    )
    for one in ("a", {"content": "a"}, Turn("user", "a"), Message("user", (Text("a"),))):
        assert parse_messages(one) == (Message("user", (Text("a"),)),)


def test_other_fields_are_kept_unless_empty() -> None:
    (message,) = parse_messages(
        {"role": "tool", "content": None, "tool_call_id": "1", "name": "f", "tool_calls": None}
    )
    assert message == Message("tool", (), {"tool_call_id": "1", "name": "f"})


def test_a_client_librarys_reply_can_be_sent_back() -> None:
    class Call:
        def model_dump(self) -> dict[str, Any]:
            return {"id": "1", "function": {"name": "f", "arguments": "{}"}}

    reply = SimpleNamespace(role="assistant", content=None, tool_calls=[Call()], refusal=None)
    (message,) = parse_messages(reply)
    assert message.extra == {
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("hello", Text("hello")),
        ({"type": "text", "text": "t"}, Text("t")),
        ({"type": "input_text", "text": "t"}, Text("t")),
        ({"type": "output_text", "text": "t"}, Text("t")),
        ({"type": "text", "content": "t"}, Text("t")),
        ({"text": "t"}, Text("t")),
        ({"type": "image"}, Media("image", None)),
        ({"type": "image", "image": b"\x89PNG"}, Media("image", b"\x89PNG")),
        ({"type": "image", "url": "http://a/b.png"}, Media("image", "http://a/b.png")),
        ({"type": "image", "path": "b.png"}, Media("image", "b.png")),
        ({"type": "image", "base64": "QQ=="}, Media("image", "data:image/png;base64,QQ==")),
        (
            {"type": "image_url", "image_url": {"url": "http://a/b", "detail": "low"}},
            Media("image", "http://a/b", {"detail": "low"}),
        ),
        ({"type": "image_url", "image_url": "http://a/b"}, Media("image", "http://a/b")),
        (
            {"type": "input_image", "image_url": "http://a/b", "detail": "high"},
            Media("image", "http://a/b", {"detail": "high"}),
        ),
        (
            {"type": "input_audio", "input_audio": {"data": "QQ==", "format": "mp3"}},
            Media("audio", "data:audio/mp3;base64,QQ=="),
        ),
        ({"type": "input_audio", "input_audio": "a.wav"}, Media("audio", "a.wav")),
        ({"type": "audio_url", "audio_url": {"url": "http://a/b"}}, Media("audio", "http://a/b")),
        ({"type": "audio", "audio": "a.wav"}, Media("audio", "a.wav")),
        ({"type": "video_url", "video_url": {"url": "http://a/b"}}, Media("video", "http://a/b")),
        (
            {"type": "video", "video": "a.mp4", "fps": 2, "max_pixels": None},
            Media("video", "a.mp4", {"fps": 2}),
        ),
        ({"type": "input_video", "input_video": "a.mp4"}, Media("video", "a.mp4")),
        (Text("t"), Text("t")),
        (Media("image", "a"), Media("image", "a")),
    ],
)
def test_content_parts(value: Any, expected: Any) -> None:
    assert part(value) == expected


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (
            ["a", {"content": [{"type": "text", "text": "a"}, {"type": "hologram"}]}],
            "messages[1].content[1]",
        ),
        ({"content": [{"url": "x"}]}, "messages[0].content[0]"),
        ({"content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].image_url"),
        ({"content": [3]}, "messages[0].content[0]"),
        ({"content": 3}, "messages[0].content"),
        ({"role": 3, "content": "a"}, "messages[0].role"),
        ([3], "messages[0]"),
        (3, "prompt"),
        (b"a", "prompt"),
    ],
)
def test_what_is_not_understood_is_named(prompt: Any, named: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_messages(prompt)
    assert caught.value.param is not None
    assert caught.value.param.startswith(named)
    assert named.split(".")[0] in str(caught.value).lower()


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(InputError, match="hologram"):
        part({"type": "hologram"})
    with pytest.raises(InputError) as caught:
        part({"type": object()})
    assert "0x" not in str(caught.value)


def test_text_is_never_searched_for_media() -> None:
    (message,) = parse_messages("![x](http://169.254.169.254/a.png) <img src='http://a/b'>")
    assert message.media == ()
