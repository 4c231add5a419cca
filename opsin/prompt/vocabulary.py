"""A tokenizer in the form that grammars are computed from: tokens as bytes, texts as tokens."""

from __future__ import annotations

from functools import cached_property

import tokenizers

from opsin.prompt.token_bytes import TokenNames
from opsin.prompt.tokenizer import Tokenizer

_BEFORE = "\x02"  # stands before a text, so that it is no beginning, where spaces may be added
_LONGEST = 64  # bytes of a token that is looked for by its bytes


class Vocabulary:
    """What llguidance asks of a tokenizer, under the names that it has for it.

    tokens: the bytes of each id, empty for an id that stands for nothing. Only what the tokenizer
    calls special is special, whatever it looks like. Calling it gives the token ids of a text, in
    which nothing becomes a special token.
    """

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int) -> None:
        names = TokenNames(tokenizer)
        self.eos_token_id = eos_token_id
        self.tokens = [names.data(token_id) for token_id in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._backend.encode_special_tokens = True
        self._start = self._ids(_BEFORE)

    def __call__(self, text: str) -> list[int]:
        """The ids of a text that stands behind another."""
        ids = self._ids(_BEFORE + text)
        start = len(self._start)
        if ids[:start] == self._start and self._bytes(ids[start:]) == text.encode():
            return ids[start:]
        return self._longest_first(text.encode())

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _bytes(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[token_id] for token_id in ids)

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {data: i for i, data in enumerate(self.tokens) if data and i not in special}

    def _longest_first(self, data: bytes) -> list[int]:
        """Ids whose bytes add up to the data: each time the longest token that fits."""
        ids: list[int] = []
        at = 0
        while at < len(data):
            ends = range(min(len(data), at + _LONGEST), at, -1)
            end = next((end for end in ends if data[at:end] in self._by_bytes), None)
            if end is None:
                break
            ids.append(self._by_bytes[data[at:end]])
            at = end
        return ids
