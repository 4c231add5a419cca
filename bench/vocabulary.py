"""A made-up vocabulary for random weights, for GGUF files and as a tokenizer.json: a byte a token.

Standard library only, since a rival's Python reads it too. Both forms number the same words, so
that the same text is as many tokens for both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SPECIAL = {
    "qwen3_vl": {
        151652: "<|vision_start|>",
        151653: "<|vision_end|>",
        151655: "<|image_pad|>",
        151656: "<|video_pad|>",
    },
    "idefics3": {
        49152: "<fake_token_around_image>",
        49153: "<global-img>",
        **{49154 + 6 * r + c: f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)},
        49190: "<image>",
    },
}
BREAK = "\u010a"  # how a line break is written; two of them are the one token that is merged
MERGED_ID = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes in a vocabulary of the GPT-2 kind."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (byte for byte in range(256) if byte not in plain)
    moved = {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]


def words(model_type: str, size: int) -> list[str]:
    """`size` words in which bytes and the special tokens of a picture mean something."""
    found = [*byte_characters(), *(f"w{i}" for i in range(256, size))]
    found[MERGED_ID] = BREAK * 2
    for i, word in SPECIAL[model_type].items():
        found[i] = word
    return found


def write_tokenizer(folder: Path, model_type: str, size: int) -> None:
    """`tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of the vocabulary."""
    special = [
        {"id": i, "content": word, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, word in sorted(SPECIAL[model_type].items())
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": byte_level | {"use_regex": False},
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {word: i for i, word in enumerate(words(model_type, size))},
            "merges": [[BREAK, BREAK]],
        },
    }
    ends = {"bos_token": f"w{size - 2}", "eos_token": f"w{size - 1}", "add_bos_token": False}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(ends))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
