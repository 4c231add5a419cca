"""How much one request may ask for, and the checks that hold it to that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsin import families
from opsin.errors import InputError, MediaTooLarge
from opsin.server.settings import ServeSettings
from opsin.types import Message


@dataclass(frozen=True, slots=True)
class Bounds:
    """max_tokens: answer length where none is asked. max_pixels: of one picture, after resizing
    too. allow_templates: whether a request may bring a chat template.
    """

    max_tokens: int = 4096
    max_n: int = 16
    max_media: int = 64
    max_pixels: int = 2**26
    allow_templates: bool = False

    @classmethod
    def of(cls, settings: ServeSettings) -> Bounds:
        """The bounds that a server's settings state."""
        return cls(
            settings.max_tokens,
            settings.max_n,
            settings.max_media,
            settings.max_image_pixels,
            settings.allow_request_templates,
        )

    def check_answers(self, n: int, param: str = "n") -> int:
        """`n`, unless it is over `max_n`."""
        if n > self.max_n:
            raise InputError(
                f"{param} cannot be {n}",
                why=f"this server gives at most {self.max_n} answers to a request",
                remedy="Ask for fewer, or start the server with a higher --max-n",
                param=param,
            )
        return n

    def check_media(self, messages: tuple[Message, ...]) -> None:
        """Refuse a conversation with more media than `max_media`, before any is fetched."""
        count = sum(len(message.media) for message in messages)
        if count > self.max_media:
            raise MediaTooLarge(
                f"The request holds {count} pictures, sounds and videos",
                why=f"this server takes {self.max_media}",
                remedy="Send fewer, or start the server with a higher --max-media",
                param="messages",
            )

    def check_template(self, template: Mapping[str, Any]) -> None:
        """Refuse a request's own chat template unless the operator allowed them.

        What is let through must be a template itself: any other text would name a file. The name of
        one that comes with the package is nobody's program, and may always be chosen.
        """
        text = template.get("chat_template")
        if text is None or families.bundled_template(text) is not None:
            return
        if not self.allow_templates:
            raise InputError(
                "A request cannot bring a chat template",
                why="templates are programs",
                remedy="Leave it out, or start the server with --allow-request-templates",
                param="chat_template",
            )
        if "{%" not in text and "{{" not in text:
            raise InputError(
                "chat_template is not a Jinja template",
                why="it has no {{ }} and no {% %}",
                param="chat_template",
            )

    def check_processor(self, options: Mapping[str, Any]) -> None:
        """Refuse picture options that would blow a picture up beyond `max_pixels`."""
        for name, value in options.items():
            where = "resize_shape" if name == "resize_shape" else f"processor_kwargs.{name}"
            pixels = _resized_pixels(value) if name == "resize_shape" else _largest(value, where)
            if pixels > self.max_pixels:
                raise MediaTooLarge(
                    f"{where} is too large",
                    why=f"it asks for {pixels:,.0f}, the limit is {self.max_pixels:,} pixels",
                    remedy="Ask for less, or raise --max-image-pixels",
                    param=where,
                )


def _resized_pixels(shape: Any) -> float:
    sides = [shape, shape] if isinstance(shape, int) else [*shape, *shape]
    return float(sides[0] * sides[1])


def _largest(value: Any, where: str, depth: int = 0) -> float:
    """The largest number anywhere in a JSON value."""
    if depth > 8:
        raise InputError(f"{where} is nested too deeply", param=where)
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return 0.0
    if isinstance(value, int | float):
        if value < 0:
            raise InputError(f"{where} cannot be negative", param=where)
        return float(min(value, 10**18))
    items = value.values() if isinstance(value, Mapping) else value
    return max((_largest(item, where, depth + 1) for item in items), default=0.0)
