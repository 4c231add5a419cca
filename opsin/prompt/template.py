"""Chat templates: where a checkpoint keeps them, which one applies, and rendering them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsin.checkpoint.config import read_json, read_value
from opsin.errors import CheckpointError, InputError
from opsin.prompt.renderer import Renderer, shared_renderer
from opsin.prompt.special_tokens import (
    read_tokenizer_config,
    special_token_map,
)

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_TAG = "OPSIN_CONTINUES_HERE "


@dataclass(frozen=True)
class ChatTemplate:
    """The templates of one checkpoint by name, and the special tokens they can write.

    `sources` has at least one entry; "default" is what plain chats use, "tool_use" (if there) chats
    with tools. `variables` are special tokens by name, such as `bos_token`.
    """

    sources: Mapping[str, str]
    variables: Mapping[str, str] = field(default_factory=dict)
    renderer: Renderer = field(default_factory=shared_renderer, compare=False)

    @classmethod
    def from_text(cls, text: str, variables: Mapping[str, str] | None = None) -> "ChatTemplate":
        """A template given literally."""
        return cls({"default": text}, variables or {})

    @classmethod
    def from_file(
        cls, path: str | Path, variables: Mapping[str, str] | None = None
    ) -> "ChatTemplate":
        """A template file: Jinja text, or JSON holding one, alone or as its `chat_template`."""
        from opsin import families

        path = Path(path)
        if not path.is_file():
            raise InputError(
                f"There is no chat template {path.name}",
                why="no file has that name, and none of the bundled ones",
                remedy=f"Name a file, or one of {', '.join(families.bundled_templates())}",
                param="chat_template",
            )
        if path.suffix.lower() != ".json":
            return cls.from_text(path.read_text(encoding="utf-8"), variables)
        value = read_value(path)
        held = value.get("chat_template", value) if isinstance(value, dict) else value
        return cls(_named_sources(held, path.name), variables or {})

    @classmethod
    def from_user(
        cls, template: str | Path, variables: Mapping[str, str] | None = None
    ) -> "ChatTemplate":
        """What a user gave as a chat template: a file, or the template itself."""
        text = str(template)
        is_literal = isinstance(template, str) and ("{%" in text or "{{" in text or "\n" in text)
        return cls.from_text(text, variables) if is_literal else cls.from_file(template, variables)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate | None":
        """The templates of a checkpoint folder, or None if it has none.

        The first of these that is there: `processor_config.json`'s `chat_template`,
        `chat_template.json`, `chat_template.jinja` with `additional_chat_templates/*.jinja`,
        `tokenizer_config.json`'s `chat_template`: the order in which Transformers' processors look.
        """
        folder = Path(folder)
        config = read_tokenizer_config(folder)
        variables = special_token_map(config)
        for file in ("processor_config.json", "chat_template.json"):
            held = read_json(folder / file).get("chat_template")
            if held:
                return cls(_named_sources(held, file), variables)
        sources = _jinja_files(folder)
        if not sources and config.get("chat_template"):
            sources = _named_sources(config["chat_template"], "tokenizer_config.json")
        return cls(sources, variables) if sources else None

    def warm_up(self) -> None:
        """Let the renderer start now, so that the first rendering need not wait for it."""
        self.renderer.warm_up()

    def source(self, name: str | None = None, *, with_tools: bool = False) -> str:
        """The template text of a name, or the one that applies with or without tools."""
        if name is None:
            name = "tool_use" if with_tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise InputError(
                f"There is no chat template named {name!r}",
                why=f"this checkpoint has {names}",
                param="chat_template",
            )
        return self.sources[name]

    def mentions(self, word: str) -> bool:
        """Whether any of the templates uses a word, such as a variable's name."""
        pattern = re.compile(rf"\b{re.escape(word)}\b")
        return any(pattern.search(text) for text in self.sources.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation.

        `continue_final_message` ends the prompt inside the last message, for the model to go on.
        `variables` reach the template; one named as a special token replaces it. Raises InputError.
        """
        if continue_final_message and add_generation_prompt:
            raise InputError(
                "A prompt cannot both continue the last message and open a new one",
                remedy="Give add_generation_prompt=False with continue_final_message",
                param="continue_final_message",
            )
        source = self.source(name, with_tools=bool(tools))
        chat = [_with_reasoning_names(plain_value(message)) for message in messages]
        ending = _tag_final_message(chat) if continue_final_message else ""
        values = {
            **self.variables,
            **plain_value(variables),
            "messages": chat,
            "tools": plain_value(tools),
            "documents": plain_value(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        text = self.renderer.render(source, values)
        return _cut_after(text, ending) if continue_final_message else text


def plain_value(value: Any) -> Any:
    """A value as plain JSON types; what is none becomes its type's name in angle brackets.

    Templates only ask whether media is there, never for its value.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else str(key): plain_value(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: plain_value(getattr(value, item.name)) for item in dataclasses.fields(value)
        }
    dump = getattr(value, "model_dump", None)
    return plain_value(dump()) if callable(dump) else f"<{type(value).__name__}>"


def _jinja_files(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def _named_sources(held: Any, file: str) -> dict[str, str]:
    """Templates by name from a string, an object of strings, or a list of `{name, template}`."""
    if isinstance(held, str):
        return {"default": held}
    if isinstance(held, list) and all(isinstance(entry, dict) for entry in held):
        held = {str(entry.get("name")): entry.get("template") for entry in held}
    if isinstance(held, dict) and held and all(isinstance(text, str) for text in held.values()):
        return dict(held)
    raise CheckpointError(
        f"{file} holds no chat template that can be read",
        why="it is neither text nor named texts",
        remedy="Give a template with --chat-template",
    )


def _with_reasoning_names(message: Any) -> dict[str, Any]:
    """A message with its reasoning, whatever it was called, under the names templates read."""
    if not isinstance(message, dict):
        raise InputError("A chat template's messages must be objects", param="messages")
    given = [message[name] for name in _REASONING_FIELDS if message.get(name) is not None]
    if not given:
        return message
    return {"thinking": given[0], **message, "reasoning_content": given[0]}


def _tag_final_message(chat: list[dict[str, Any]]) -> str:
    """Mark the end of the last message's text; returns that text."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return content
    for part in reversed(content if isinstance(content, list) else []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _CONTINUE_TAG
            if "content" in part:
                part["content"] = part["text"]
            return text
    raise InputError(
        "There is no final message to continue",
        why="the last message has no text",
        param="continue_final_message",
    )


def _cut_after(text: str, ending: str) -> str:
    """The rendered text up to the mark, less the trailing space that the template trims."""
    mark = _CONTINUE_TAG.strip()
    at = text.rfind(mark)
    if at < 0 or ending.strip() not in text:
        raise InputError(
            "This chat template cannot continue the final message",
            why="it does not write the message as it stands",
            param="continue_final_message",
        )
    kept = text[:at].replace(_CONTINUE_TAG, "").replace(mark, "")
    return kept if text.startswith(_CONTINUE_TAG, at) else kept.rstrip()


def template_kwargs(template: ChatTemplate | None, enable_thinking: bool | None) -> dict[str, Any]:
    """The variables that switch thinking on or off, by the name this template has for it."""
    if enable_thinking is None:
        return {}
    switches: dict[str, Any] = {"enable_thinking": enable_thinking}
    if template is None or template.mentions("enable_thinking"):
        return switches
    if template.mentions("thinking_mode"):
        switches["thinking_mode"] = "enabled" if enable_thinking else "disabled"
    if template.mentions("thinking"):
        switches["thinking"] = enable_thinking
    return switches


__all__ = ["ChatTemplate", "plain_value", "template_kwargs"]
