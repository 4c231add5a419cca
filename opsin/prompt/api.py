"""The public prompt functions, in the form users of this field call them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from opsin.errors import InputError
from opsin.prompt.formats import (
    DEFAULT_FPS,
    DEFAULT_MAX_PIXELS,
    MediaCounter,
    MessageDict,
    MessageFormat,
    VideoOptions,
    format_text,
    message_dict,
    plain_prompt,
)
from opsin.prompt.messages import Prompt, parse_messages
from opsin.prompt.template import ChatTemplate, template_kwargs
from opsin.prompt.tools.dialect import Dialect
from opsin.prompt.tools.index import dialect_for
from opsin.types import Media, Message, Text


class PromptTokenizer(Protocol):
    """What is asked of a tokenizer here."""

    def encode_prompt(self, text: str) -> list[int]: ...


class PromptProcessor(Protocol):
    """What is asked of a processor here; its family states a `message_format` by name."""

    @property
    def family(self) -> Any: ...

    @property
    def chat_template(self) -> ChatTemplate | None: ...

    @property
    def tokenizer(self) -> PromptTokenizer: ...


def get_message_json(
    model_name: str,
    prompt: str,
    role: str = "user",
    skip_image_token: bool = False,
    skip_audio_token: bool = False,
    num_images: int = 0,
    num_audios: int = 0,
    **kwargs: Any,
) -> MessageDict | str:
    """One message in the format of the family that `model_name` (a model type or name) belongs to.

    `kwargs` are `video` (one or a list), `max_pixels` and `fps`.
    """
    videos = _videos(kwargs)
    if kwargs:
        raise InputError(f"get_message_json() has no argument {min(kwargs)!r}", param=min(kwargs))
    return format_text(
        _format_of(model_name),
        prompt,
        role,
        num_images=num_images,
        num_audios=num_audios,
        skip_image_token=skip_image_token,
        skip_audio_token=skip_audio_token,
        videos=videos,
    )


def apply_chat_template(
    processor: PromptProcessor | None,
    config: Mapping[str, Any] | Any,
    prompt: Prompt,
    add_generation_prompt: bool = True,
    return_messages: bool = False,
    num_images: int = 0,
    num_audios: int = 0,
    **kwargs: Any,
) -> Any:
    """The prompt text of a conversation, or its messages with `return_messages=True`.

    prompt: a string, one message, or a list of strings, messages and objects with `.role` and
    `.content`. Media that the messages hold keep their place; media counted beside them
    (`num_images`, `num_audios`, `video`) get their placeholders in the first user message. A family
    of bare prompts gives the last message only, and such media go there.

    kwargs: `enable_thinking`, `video` (path, URL or list), `max_pixels` (224 * 224), `fps` (1),
    `chat_template` (text, file or name), `chat_template_kwargs`, `tools`, `documents`, `tokenize`;
    any other reaches the template as a variable.
    """
    if processor is None:
        message_format = _format_of(_model_type(config))
    else:
        message_format = MessageFormat(processor.family.message_format)
    videos = _videos(kwargs)
    messages = build_messages(message_format, prompt, num_images, num_audios, videos)
    if message_format.is_bare:
        return messages[-1] if messages else ""
    if return_messages:
        return messages
    return _render(processor, messages, add_generation_prompt, kwargs)


def build_messages(
    message_format: MessageFormat,
    prompt: Prompt,
    num_images: int = 0,
    num_audios: int = 0,
    videos: VideoOptions | None = None,
) -> list[MessageDict | str]:
    """The messages of a prompt in a format, with placeholders for media counted beside them.

    Media that a message holds itself count towards `num_images` and `num_audios`.
    """
    messages = parse_messages(prompt)
    images = max(num_images - _held(messages, "image"), 0)
    audios = max(num_audios - _held(messages, "audio"), 0)
    beside = images > 0 or audios > 0 or bool(videos and videos.parts)
    target = _media_target(message_format, messages) if beside else -1
    counter = MediaCounter()
    built: list[MessageDict | str] = []
    for index, message in enumerate(messages):
        if index != target:
            built.append(message_dict(message_format, message, counter))
            continue
        if message.media:
            content = (*_beside(images, audios, videos), *message.content)
            built.append(message_dict(message_format, replace(message, content=content), counter))
            continue
        text = "\n".join(part.text for part in message.content if isinstance(part, Text))
        first = format_text(
            message_format, text, message.role, num_images=images, num_audios=audios, videos=videos
        )
        counter.images += images
        counter.audios += audios
        built.append(first if isinstance(first, str) else {**first, **message.extra})
    return built


def _beside(num_images: int, num_audios: int, videos: VideoOptions | None) -> list[Media]:
    """Media given beside the messages, as parts of one."""
    images = [Media("image", None) for _ in range(num_images)]
    clips = [
        Media("video", part["video"], {"max_pixels": part["max_pixels"], "fps": part["fps"]})
        for part in (videos.parts if videos is not None else ())
    ]
    return [*images, *clips, *(Media("audio", None) for _ in range(num_audios))]


def _held(messages: Sequence[Message], kind: str) -> int:
    return sum(media.kind == kind for message in messages for media in message.media)


def _media_target(message_format: MessageFormat, messages: Sequence[Message]) -> int:
    """The message that gets the placeholders of media given beside the messages."""
    if message_format.is_bare:
        return len(messages) - 1
    for index, message in enumerate(messages):
        if message.role == "user":
            return index
    raise InputError(
        "Media were given but there is no user message to hold them",
        remedy="Add a user message",
        param="messages",
    )


def _render(
    processor: PromptProcessor | None,
    messages: list[MessageDict | str],
    add_generation_prompt: bool,
    options: dict[str, Any],
) -> Any:
    """Render messages with the processor's template, the user's, or as a plain transcript."""
    override = options.pop("chat_template", None)
    tokenize = options.pop("tokenize", False)
    enable_thinking = options.pop("enable_thinking", None)
    extra = options.pop("chat_template_kwargs", None) or {}
    template = _template(processor, override)
    if template is None:
        text = plain_prompt(messages, add_generation_prompt)
    else:
        dicts = [message for message in messages if isinstance(message, dict)]
        source = template.source(with_tools=True)
        dialect = dialect_for(source)
        if dialect is not None:
            dicts = dialect.prepare_messages(dicts, options.get("tools") or (), source)
        variables = template_kwargs(template, enable_thinking) | options | dict(extra)
        name = override if isinstance(override, str) and override in template.sources else None
        text = template.render(
            dicts, **{"add_generation_prompt": add_generation_prompt, "name": name, **variables}
        )
    if not tokenize:
        return text
    if processor is None:
        raise InputError("A prompt cannot be tokenized without a processor", param="tokenize")
    return processor.tokenizer.encode_prompt(text)


def tool_dialect(processor: PromptProcessor, chat_template: str | None = None) -> Dialect | None:
    """How a processor's model writes tool calls, None where its chat template knows none.

    `chat_template` is the user's, where one was given in place of the checkpoint's.
    """
    template = _template(processor, chat_template)
    return None if template is None else dialect_for(template.source(with_tools=True))


def _template(processor: PromptProcessor | None, override: Any) -> ChatTemplate | None:
    """The template to use: a name, text or file of the user's before the checkpoint's own.

    A name is one of the checkpoint's templates, or of those that come with the package.
    """
    from opsin import families

    own = processor.chat_template if processor is not None else None
    if override is None or (own is not None and override in own.sources):
        return own
    bundled = families.bundled_template(override) if isinstance(override, str) else None
    return ChatTemplate.from_user(bundled or override, own.variables if own is not None else None)


def _videos(options: dict[str, Any]) -> VideoOptions:
    """Take the video arguments out of the keyword arguments."""
    video = options.pop("video", None)
    max_pixels = options.pop("max_pixels", DEFAULT_MAX_PIXELS)
    fps = options.pop("fps", DEFAULT_FPS)
    sources = [] if video is None else list(video) if isinstance(video, list | tuple) else [video]
    if not sources:
        return VideoOptions()
    return VideoOptions(sources, max_pixels, fps)


def _format_of(model_name: str) -> MessageFormat:
    from opsin import families

    return MessageFormat(families.find(model_name.lower()).message_format)


def _model_type(config: Any) -> str:
    model_type = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    if not isinstance(model_type, str):
        raise InputError("The config names no model_type", param="config")
    return model_type
