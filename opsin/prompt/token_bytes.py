"""The bytes that single tokens stand for."""

from __future__ import annotations

import functools
import re

from opsin.prompt.byte_level import token_bytes
from opsin.prompt.detokenize import ByteLevelAssembler, assembler_for
from opsin.prompt.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenNames:
    """A tokenizer's tokens as bytes; half a character is told from a whole one by them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._make = assembler_for(tokenizer.backend)
        self._byte_level = isinstance(self._make(), ByteLevelAssembler)
        self.data = functools.lru_cache(maxsize=65_536)(self._data)

    def _data(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token in self._tokenizer.added_tokens:
            return token.encode()
        if self._byte_level:
            return token_bytes(token)
        if match := _BYTE.fullmatch(token):
            return bytes([int(match[1], 16)])
        # Beside another token, so that a leading space that starts a text is not dropped.
        assembler = self._make()
        first = assembler.push(token_id, token)
        return (assembler.push(token_id, token) or first).encode()
