"""Reads a conversation in any form people write it in into typed messages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from opsin.errors import InputError
from opsin.types import Media, Message, Part, Text


@runtime_checkable
class MessageLike(Protocol):
    """Any object with a role and a content, such as a client library's message."""

    role: str
    content: Any


Prompt: TypeAlias = str | Mapping[str, Any] | Message | MessageLike | Sequence[Any]
_Kind: TypeAlias = Literal["image", "audio", "video", "document"]

_TEXT_TYPES = ("text", "input_text", "output_text")
_MEDIA_TYPES: Mapping[str, _Kind] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
    "file": "document",
    "input_file": "document",
    "document": "document",
}
# What clients write beside a file: its name, which says nothing that the bytes do not.
_FILE_FIELDS = ("filename", "title")
_BYTES = ("base64", "data", "file_data")


def parse_messages(prompt: Prompt) -> tuple[Message, ...]:
    """Turn a string, a message, or a list of them into typed messages.

    A message is a dict, a `Message`, or an object with `.role` and `.content`; its content is a
    string, None, or a list of parts as OpenAI's clients write them. Fields other than role and
    content are kept in `Message.extra`. Raises InputError naming the part that is not understood.
    """
    if isinstance(prompt, (str, Mapping, Message, MessageLike)):
        return (_parse_message(prompt, 0),)
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        return tuple(_parse_message(item, index) for index, item in enumerate(prompt))
    raise InputError(
        f"A prompt cannot be a {type(prompt).__name__}",
        remedy="Give a string, a message or a list of messages",
        param="prompt",
    )


def _parse_message(item: Any, index: int) -> Message:
    if isinstance(item, Message):
        return item
    if isinstance(item, str):
        return Message("user", (Text(item),))
    where = f"messages[{index}]"
    if isinstance(item, Mapping):
        role = item.get("role", "user")
        content = item.get("content")
        extra = {
            key: value
            for key, value in item.items()
            if key not in ("role", "content") and value is not None
        }
    elif isinstance(item, MessageLike):
        role, content = item.role, item.content
        extra = _extra_fields(item)
    else:
        raise InputError(f"{where} is a {type(item).__name__}, not a message", param=where)
    if not isinstance(role, str) or not role:
        raise InputError(
            f"{where} has no role", remedy='Give "role", such as "user"', param=f"{where}.role"
        )
    return Message(role, _parse_content(content, f"{where}.content"), extra)


def _extra_fields(item: MessageLike) -> dict[str, Any]:
    """The fields beside role and content that templates may read of a client library's message."""
    names = ("name", "tool_calls", "tool_call_id", "reasoning_content")
    found = {name: getattr(item, name, None) for name in names}
    return {name: _plain(value) for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    """Typed objects of a client library as plain values."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    dump = getattr(value, "model_dump", None)
    return dump() if callable(dump) else value


def _parse_content(content: Any, where: str) -> tuple[Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (Text(content),)
    if isinstance(content, Text | Media | Mapping):
        return (_parse_part(content, where),)
    if isinstance(content, Sequence) and not isinstance(content, bytes | bytearray):
        return tuple(_parse_part(part, f"{where}[{index}]") for index, part in enumerate(content))
    raise InputError(
        f"{where} is a {type(content).__name__}",
        remedy="Give a string or a list of parts",
        param=where,
    )


def _parse_part(part: Any, where: str) -> Part:
    if isinstance(part, Text | Media):
        return part
    if isinstance(part, str):
        return Text(part)
    part = part if isinstance(part, Mapping) else _plain(part)
    if not isinstance(part, Mapping):
        raise InputError(f"{where} is a {type(part).__name__}, not a content part", param=where)
    kind = part.get("type", "text" if "text" in part else None)
    if kind in _TEXT_TYPES:
        return Text(_text_of(part, where))
    if kind in _MEDIA_TYPES:
        return _parse_media(part, str(kind), where)
    known = ", ".join([*_TEXT_TYPES, *_MEDIA_TYPES])
    raise InputError(
        f"{where} has the unknown type {kind[:80]!r}"
        if isinstance(kind, str)
        else f"{where} has no type",
        remedy=f"known types: {known}",
        param=f"{where}.type",
    )


def _text_of(part: Mapping[str, Any], where: str) -> str:
    text = part.get("text", part.get("content"))
    if not isinstance(text, str):
        raise InputError(
            f"{where} has no text", remedy='Give "text" as a string', param=f"{where}.text"
        )
    return text


def _parse_media(part: Mapping[str, Any], part_type: str, where: str) -> Media:
    """A media part; the source may be missing, when the media is given beside the messages."""
    kind = _MEDIA_TYPES[part_type]
    used: list[str] = ["type"]
    options: dict[str, Any] = {}
    source: Any = None
    keys = (part_type, f"{kind}_url", kind, "url", "path", "source", *_BYTES, "file_url")
    for key in keys:
        if part.get(key) is None:
            continue
        used.append(key)
        source = _as_data_url(part, kind, key) if key in _BYTES else part[key]
        break
    if isinstance(source, Mapping):
        source, options = _nested_source(source, kind, f"{where}.{used[-1]}")
    ignored = {*used, "format"} if "data" in used or "base64" in used else set(used)
    options |= {
        key: value for key, value in part.items() if key not in ignored and value is not None
    }
    if kind == "document":
        options = {key: value for key, value in options.items() if key not in _FILE_FIELDS}
    return Media(kind, source, options)


def _nested_source(value: Mapping[str, Any], kind: _Kind, where: str) -> tuple[Any, dict[str, Any]]:
    """The source inside `{"url": ...}`, `{"path": ...}` or `{"data": ..., "format": ...}`."""
    readers: Mapping[str, Callable[[], Any]] = {
        "url": lambda: value["url"],
        "path": lambda: value["path"],
        "data": lambda: _as_data_url(value, kind, "data"),
        "file_data": lambda: _as_data_url(value, kind, "file_data"),
        "file_url": lambda: value["file_url"],
    }
    for key, read in readers.items():
        if value.get(key) is not None:
            rest = {
                name: item
                for name, item in value.items()
                if name not in (key, "format") and item is not None
            }
            return read(), rest
    raise InputError(f"{where} names no {kind}", remedy='Give "url" or "data"', param=where)


def _as_data_url(value: Mapping[str, Any], kind: _Kind, key: str) -> Any:
    """Base64 text with its format as a data URL; a URL stays as it is."""
    data = value[key]
    if not isinstance(data, str) or data.startswith(("data:", "http://", "https://", "file://")):
        return data
    if kind == "document":
        return f"data:application/pdf;base64,{data}"
    default = {"image": "png", "audio": "wav", "video": "mp4"}[kind]
    return f"data:{kind}/{value.get('format') or default};base64,{data}"
