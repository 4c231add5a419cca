"""The printable characters that byte-level vocabularies write bytes as.

Printable Latin-1 characters stand for their own byte, the other bytes for the characters from
U+0100 on (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019).
"""

from collections.abc import Mapping
from functools import lru_cache


def _characters() -> list[str]:
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


CHAR_OF_BYTE: tuple[str, ...] = tuple(_characters())
BYTE_OF_CHAR: Mapping[str, int] = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}


@lru_cache(maxsize=65_536)
def token_bytes(token: str) -> bytes:
    """The bytes a token stands for; a token outside the alphabet stands for its own UTF-8."""
    try:
        return bytes(map(BYTE_OF_CHAR.__getitem__, token))
    except KeyError:
        return token.encode()
