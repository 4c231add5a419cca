"""Which dialect a checkpoint speaks: by its chat template's own words, or by name."""

from collections.abc import Mapping
from dataclasses import dataclass

from opsin.errors import InputError
from opsin.prompt.tools.dialect import Dialect
from opsin.prompt.tools.hermes import Hermes

DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in (Hermes(),)}


@dataclass(frozen=True, slots=True)
class _Sign:
    """A dialect and the texts of a template that tell it, all of which must be there."""

    dialect: str
    texts: tuple[str, ...]


# The most specific first.
_SIGNS = (_Sign("hermes", ("<tool_call>",)),)


def dialect_for(chat_template: str | None) -> Dialect | None:
    """The dialect that a chat template asks its model to use, or None if it knows no tools."""
    if not chat_template or "tools" not in chat_template:
        return None
    found = (sign for sign in _SIGNS if all(text in chat_template for text in sign.texts))
    return next((DIALECTS[sign.dialect] for sign in found), None)


def dialect_named(name: str) -> Dialect:
    """The dialect of a name. Raises InputError."""
    if name not in DIALECTS:
        raise InputError(
            f"There is no tool-call dialect named {name[:80]!r}",
            remedy=f"One of {', '.join(DIALECTS)}",
            param="tool_call_parser",
        )
    return DIALECTS[name]
