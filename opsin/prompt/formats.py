"""The message structures that chat templates of different families expect, as pure functions.

A family states its `MessageFormat`. `format_text` builds one message from a text and counts of
media, the placeholders where the format puts them; `message_dict` builds one from a typed
`Message`, each placeholder where its media stood in the reading order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

from opsin.errors import InputError
from opsin.types import Media, Message, Part, Text

MessageDict: TypeAlias = dict[str, Any]

DEFAULT_MAX_PIXELS = 224 * 224
DEFAULT_FPS = 1.0


class MessageFormat(Enum):
    """How a message with media is written for a chat template."""

    LIST_WITH_IMAGE = "list_with_image"
    LIST_WITH_IMAGE_FIRST = "list_with_image_first"
    LIST_WITH_IMAGE_URL_FIRST = "list_with_image_url_first"
    LIST_WITH_IMAGE_TYPE = "list_with_image_type"
    LIST_WITH_IMAGE_TYPE_TEXT = "list_with_image_type_text"
    LIST_WITH_IMAGE_TYPE_TEXT_IMAGE_LAST = "list_with_image_type_text_image_last"
    IMAGE_TOKEN = "image_token"
    IMAGE_TOKEN_PIPE = "image_token_pipe"
    START_IMAGE_TOKEN = "start_image_token"
    IMAGE_TOKEN_NEWLINE = "image_token_newline"
    NUMBERED_IMAGE_TOKENS = "numbered_image_tokens"
    PROMPT_ONLY = "prompt_only"
    PROMPT_WITH_IMAGE_TOKEN = "prompt_with_image_token"
    PROMPT_WITH_START_IMAGE_TOKEN = "prompt_with_start_image_token"
    VIDEO_WITH_TEXT = "video_with_text"

    @property
    def is_bare(self) -> bool:
        """Whether a message is a bare prompt string, with no role and no chat template."""
        return self in _BARE_IMAGE_TOKENS

    @property
    def is_list(self) -> bool:
        """Whether a message's content is a list of typed parts."""
        return self in _LIST_STYLES


@dataclass(frozen=True, slots=True)
class _ListStyle:
    """How a list format orders and names its parts."""

    image_type: str = "image"
    image_last: bool = False
    assistant_is_text: bool = False


_LIST_STYLES: Mapping[MessageFormat, _ListStyle] = {
    MessageFormat.LIST_WITH_IMAGE: _ListStyle(image_last=True),
    MessageFormat.LIST_WITH_IMAGE_FIRST: _ListStyle(),
    MessageFormat.LIST_WITH_IMAGE_URL_FIRST: _ListStyle(image_type="image_url"),
    MessageFormat.LIST_WITH_IMAGE_TYPE: _ListStyle(assistant_is_text=True),
    MessageFormat.LIST_WITH_IMAGE_TYPE_TEXT: _ListStyle(assistant_is_text=True),
    MessageFormat.LIST_WITH_IMAGE_TYPE_TEXT_IMAGE_LAST: _ListStyle(
        image_last=True, assistant_is_text=True
    ),
    MessageFormat.VIDEO_WITH_TEXT: _ListStyle(),
}

_IMAGE_TOKENS: Mapping[MessageFormat, str] = {
    MessageFormat.IMAGE_TOKEN: "<image>",
    MessageFormat.IMAGE_TOKEN_PIPE: "<|image|>",
    MessageFormat.START_IMAGE_TOKEN: "<start_of_image>",
    MessageFormat.IMAGE_TOKEN_NEWLINE: "<image>\n",
    MessageFormat.NUMBERED_IMAGE_TOKENS: "<|image_{}|>",
}

_BARE_IMAGE_TOKENS: Mapping[MessageFormat, str] = {
    MessageFormat.PROMPT_ONLY: "",
    MessageFormat.PROMPT_WITH_IMAGE_TOKEN: "<image>",
    MessageFormat.PROMPT_WITH_START_IMAGE_TOKEN: "<start_of_image>",
}

_TOKENS_AFTER_TEXT = (
    MessageFormat.START_IMAGE_TOKEN,
    MessageFormat.PROMPT_WITH_START_IMAGE_TOKEN,
)

_AUDIO_TOKEN = "<|audio_{}|>"


@dataclass(slots=True)
class MediaCounter:
    """How many images and sounds a conversation has named so far, for the numbered placeholders."""

    images: int = 0
    audios: int = 0


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """The videos of one message and how they are to be sampled.

    `sources` are paths or URLs; `fps` is one rate for all or one for each; `max_pixels` bounds a
    frame.
    """

    sources: Sequence[Any] = ()
    max_pixels: int = DEFAULT_MAX_PIXELS
    fps: float | Sequence[float] = DEFAULT_FPS
    parts: tuple[MessageDict, ...] = field(init=False)

    def __post_init__(self) -> None:
        rates = [self.fps] * len(self.sources) if isinstance(self.fps, int | float) else self.fps
        if len(rates) != len(self.sources):
            raise InputError(
                "The videos and their rates do not match",
                why=f"{len(rates)} fps values for {len(self.sources)} videos",
                remedy="Give one fps, or one for each video",
                param="fps",
            )
        parts = tuple(
            {"type": "video", "video": source, "max_pixels": self.max_pixels, "fps": fps}
            for source, fps in zip(self.sources, rates, strict=True)
        )
        object.__setattr__(self, "parts", parts)


def format_text(
    message_format: MessageFormat,
    text: str,
    role: str = "user",
    *,
    num_images: int = 0,
    num_audios: int = 0,
    skip_image_token: bool = False,
    skip_audio_token: bool = False,
    videos: VideoOptions | None = None,
) -> MessageDict | str:
    """One message from a text and counts of media; a bare format gives a string.

    Only a user's message gets image and audio placeholders. Raises InputError for videos in a
    format whose messages cannot name one.
    """
    images = num_images if role == "user" and not skip_image_token else 0
    audios = num_audios if role == "user" and not skip_audio_token else 0
    clips = videos.parts if videos is not None else ()
    if message_format.is_list:
        return _list_message(_LIST_STYLES[message_format], text, role, images, audios, clips)
    if clips:
        raise _no_video()
    if message_format.is_bare:
        tokens = _BARE_IMAGE_TOKENS[message_format] * (0 if skip_image_token else num_images)
        return text + tokens if message_format in _TOKENS_AFTER_TEXT else tokens + text
    return {"role": role, "content": _token_text(message_format, text, images, audios)}


def _list_message(
    style: _ListStyle,
    text: str,
    role: str,
    num_images: int,
    num_audios: int,
    clips: tuple[MessageDict, ...],
) -> MessageDict:
    if role == "assistant" and style.assistant_is_text and not clips:
        return {"role": role, "content": text}
    images = [{"type": style.image_type} for _ in range(num_images)]
    audios = [{"type": "audio"} for _ in range(num_audios)]
    if clips:
        return {"role": role, "content": [*images, *clips, *audios, _text_part(text)]}
    pictures_and_text = (
        [_text_part(text), *images] if style.image_last else [*images, _text_part(text)]
    )
    return {"role": role, "content": [*pictures_and_text, *audios]}


def _token_text(message_format: MessageFormat, text: str, num_images: int, num_audios: int) -> str:
    template = _IMAGE_TOKENS[message_format]
    images = "".join(template.format(number + 1) for number in range(num_images))
    audios = "".join(_AUDIO_TOKEN.format(number + 1) for number in range(num_audios))
    if message_format is MessageFormat.NUMBERED_IMAGE_TOKENS:
        return images + audios + text
    return (
        audios + text + images if message_format in _TOKENS_AFTER_TEXT else audios + images + text
    )


def message_dict(
    message_format: MessageFormat, message: Message, counter: MediaCounter | None = None
) -> MessageDict | str:
    """One typed message in a format, every placeholder where its media stands.

    `counter` numbers the placeholders of a conversation and is advanced; `Message.extra` (tool
    calls, names, reasoning) is carried over, tool-call arguments as objects, not as JSON text.
    """
    counter = counter if counter is not None else MediaCounter()
    if message_format.is_bare:
        return _flat_text(message_format, message.content, counter)
    content: str | list[MessageDict]
    if message_format.is_list and not _is_plain(message_format, message):
        style = _LIST_STYLES[message_format]
        content = [_list_part(style, part) for part in message.content]
    else:
        content = _flat_text(message_format, message.content, counter)
    return {"role": message.role, "content": content, **_template_extra(message.extra)}


def _is_plain(message_format: MessageFormat, message: Message) -> bool:
    """Whether a list format writes this message's content as a string all the same."""
    if message.media:
        return False
    if message.role == "tool" or "tool_calls" in message.extra:
        return True
    return message.role == "assistant" and _LIST_STYLES[message_format].assistant_is_text


def _list_part(style: _ListStyle, part: Part) -> MessageDict:
    if isinstance(part, Text):
        return _text_part(part.text)
    if part.kind == "image":
        return {"type": style.image_type}
    if part.kind == "audio":
        return {"type": "audio"}
    if part.kind == "document":
        raise _no_document()
    return {"type": "video", "video": _template_source(part), **part.options}


def _template_source(media: Media) -> str:
    """What a template may see of a source: the name if it is short, never bytes or pixels."""
    if isinstance(media.source, str) and not media.source.startswith("data:"):
        return media.source
    return "<video>"


def _flat_text(message_format: MessageFormat, parts: Sequence[Part], counter: MediaCounter) -> str:
    """The parts as one string, a newline between two texts that follow each other."""
    pieces: list[str] = []
    for previous, part in zip([None, *parts], parts, strict=False):
        if isinstance(part, Text):
            pieces.append(f"\n{part.text}" if isinstance(previous, Text) else part.text)
        else:
            pieces.append(_placeholder(message_format, part, counter))
    return "".join(pieces)


def _placeholder(message_format: MessageFormat, media: Media, counter: MediaCounter) -> str:
    if media.kind == "image":
        counter.images += 1
        if message_format.is_bare:
            return _BARE_IMAGE_TOKENS[message_format]
        return _IMAGE_TOKENS[message_format].format(counter.images)
    if media.kind == "audio":
        counter.audios += 1
        return "" if message_format.is_bare else _AUDIO_TOKEN.format(counter.audios)
    if media.kind == "document":
        raise _no_document()
    raise _no_video()


def _text_part(text: str) -> MessageDict:
    return {"type": "text", "text": text, "content": text}


def _no_video() -> InputError:
    return InputError(
        "This model's prompts cannot name a video",
        why="its messages have a place for images only",
        remedy="Send frames of the video as images, or choose a model that takes video",
        param="video",
    )


def _no_document() -> InputError:
    return InputError(
        "A template cannot name a document",
        why="models see its pages as pictures, and how many there are is not known here",
        remedy="Give it to generate or the server, or send its pages as images",
        param="messages",
    )


def _template_extra(extra: Mapping[str, Any]) -> MessageDict:
    """The other fields of a message as templates read them: tool-call arguments are objects."""
    fields = dict(extra)
    calls = fields.get("tool_calls")
    if calls is None:
        fields.pop("tool_calls", None)
        return fields
    fields["tool_calls"] = [_call_with_object_arguments(call) for call in calls]
    return fields


def _call_with_object_arguments(call: Any) -> Any:
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        return call
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"] or "{}")
        except json.JSONDecodeError:
            return call  # a model may have written it; the template prints it as it stands
    return {**call, "function": function}


def plain_prompt(messages: Sequence[MessageDict | str], add_generation_prompt: bool) -> str:
    """A transcript for a checkpoint with no chat template: one user message is its own text.

    Otherwise `Role: text` lines, with `Assistant:` last when an answer is to follow.
    """
    turns = [
        ("user", message)
        if isinstance(message, str)
        else (message["role"], _flatten(message["content"]))
        for message in messages
    ]
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    lines = [f"{role.capitalize()}: {text}".rstrip() for role, text in turns]
    return "\n".join([*lines, "Assistant:"] if add_generation_prompt else lines)


def _flatten(content: str | Sequence[MessageDict]) -> str:
    if isinstance(content, str):
        return content
    tokens = {"image": "<image>", "image_url": "<image>", "audio": "<audio>", "video": "<video>"}
    return "".join(str(tokens.get(part["type"]) or part.get("text", "")) for part in content)
