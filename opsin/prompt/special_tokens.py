"""Reads the small JSON files beside a tokenizer: its configuration and its special tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsin.checkpoint.config import read_json

NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, with what the older `special_tokens_map.json` adds to it.

    The older file counts only where the newer one lists no `added_tokens_decoder`.
    """
    config = read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config.update(read_json(folder / "special_tokens_map.json"))
    return config


def special_token_map(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens of a tokenizer configuration: `bos_token`, `image_token`, ...

    These are also the variables that chat templates can use. A family's own names stand at the top
    level (`*_token`) or in an `extra_special_tokens` object.
    """
    named = {key: token_text(value) for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, Mapping):
        named |= {key: token_text(value) for key, value in extra.items()}
    return {key: text for key, text in named.items() if text is not None}


def unnamed_special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Further special tokens, listed without names."""
    listed = config.get("extra_special_tokens")
    if not isinstance(listed, list) or not listed:
        listed = config.get("additional_special_tokens") or []
    texts = [token_text(value) for value in listed]
    return [text for text in texts if text is not None]


def token_text(value: Any) -> str | None:
    """A token's text, given as text or as an object with a `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None
