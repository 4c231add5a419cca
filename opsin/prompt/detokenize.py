"""Token ids to text one token at a time: whole characters only, in time linear in the tokens.

The text is what decoding all ids at once gives, with one exception: where a run of byte tokens is
not valid UTF-8, the characters that are whole in it stand, since they were given out already.
"""

import codecs
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias

import tokenizers

from opsin.prompt.byte_level import token_bytes
from opsin.prompt.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turns a stream of token ids into text.

    Special tokens are left out unless `skip_special_tokens` is False or their id is in `keep` (a
    family's reasoning and tool-call tags, where those are special tokens).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        keep: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        skipped = tokenizer.special_ids.difference(keep) if skip_special_tokens else ()
        self._skipped = frozenset(skipped)
        self._assembler = assembler_for(tokenizer.backend)()

    def push(self, token_id: int) -> str:
        """The text that a token completes; it may be empty."""
        if token_id in self._skipped:
            return ""
        token = self._tokenizer.id_to_token(token_id)
        return "" if token is None else self._assembler.push(token_id, token)

    def extend(self, token_ids: Iterable[int]) -> str:
        """The text that several tokens complete."""
        return "".join([self.push(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """What is left at the end: the mark for each character that never became whole."""
        return self._assembler.finish()


class Assembler(Protocol):
    """Joins tokens by the rules of one kind of tokenizer."""

    def push(self, token_id: int, token: str) -> str: ...

    def finish(self) -> str: ...


class ByteLevelAssembler:
    """Tokens are bytes written as printable characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, token: str) -> str:
        return self._decoder.decode(token_bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteFallbackAssembler:
    """Tokens are text with some characters replaced, beside `<0xE2>` tokens for single bytes.

    `strip` characters are taken from the front of the whole text, as many as are there.
    """

    def __init__(self, replaced: Mapping[str, str], byte_fallback: bool, strip: str) -> None:
        self._replaced = replaced
        self._byte_fallback = byte_fallback
        self._strip = strip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, token: str) -> str:
        byte = _byte_of(token) if self._byte_fallback else None
        if byte is not None:
            return self._stripped(self._decoder.decode(bytes([byte])))
        for old, new in self._replaced.items():
            token = token.replace(old, new)
        return self._stripped(self._end_of_bytes() + token)

    def finish(self) -> str:
        return self._stripped(self._end_of_bytes())

    def _end_of_bytes(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _stripped(self, text: str) -> str:
        while text and self._strip:
            if text[0] != self._strip[0]:
                self._strip = ""
                break
            text = text[1:]
            self._strip = self._strip[1:]
        return text


class MetaspaceAssembler:
    """Tokens are text with a mark for a space; those before the first word stand for nothing."""

    def __init__(self, mark: str, drops_first: bool) -> None:
        self._mark = mark
        self._drops = drops_first

    def push(self, token_id: int, token: str) -> str:
        text = token.replace(self._mark, "" if self._drops else " ")
        self._drops = False
        return text

    def finish(self) -> str:
        return ""


class WindowAssembler:
    """Any other kind: decode the newest tokens with and without those before them.

    A window ends at a whole character, or after `_LONGEST` tokens, so that its length is bounded.
    """

    _LONGEST = 12

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._before: list[int] = []
        self._newest: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._newest.append(token_id)
        text = self._text()
        if text.endswith(_REPLACEMENT) and len(self._newest) < self._LONGEST:
            return ""
        self._before, self._newest = self._newest, []
        return text

    def finish(self) -> str:
        text = self._text()
        self._before, self._newest = [], []
        return text

    def _text(self) -> str:
        known = self._backend.decode(self._before, skip_special_tokens=False)
        both = self._backend.decode(self._before + self._newest, skip_special_tokens=False)
        return str(both[len(known) :])


_Factory: TypeAlias = Callable[[], Assembler]


def assembler_for(backend: tokenizers.Tokenizer) -> _Factory:
    """What makes the assembler for a tokenizer, by the decoder that it states."""
    window = partial(WindowAssembler, backend)
    if backend.decoder is None:
        return window
    decoder = json.loads(backend.decoder.__getstate__())
    if decoder["type"] == "ByteLevel":
        return ByteLevelAssembler
    if decoder["type"] == "Metaspace":
        drops = decoder.get("prepend_scheme", "always") != "never"
        return partial(MetaspaceAssembler, decoder["replacement"], drops)
    if decoder["type"] == "Sequence":
        return _for_sequence(decoder["decoders"]) or window
    return window


def _for_sequence(steps: list[dict[str, Any]]) -> _Factory | None:
    """The assembler for replacements, byte fallback, fusing and stripping, in this order."""
    order = ["Replace", "ByteFallback", "Fuse", "Strip"]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevelAssembler
    in_order = all(kind in order for kind in kinds) and kinds == sorted(kinds, key=order.index)
    replaced: dict[str, str] = {}
    strip = ""
    for step in steps if in_order else ():
        if step["type"] == "Replace":
            if "String" not in step["pattern"]:
                return None
            replaced[step["pattern"]["String"]] = step["content"]
        elif step["type"] == "Strip":
            if step["stop"] or "Fuse" not in kinds:
                return None
            strip += step["content"] * step["start"]
    if not in_order:
        return None
    return partial(ByteFallbackAssembler, replaced, "ByteFallback" in kinds, strip)


def _byte_of(token: str) -> int | None:
    """The byte that a token such as `<0xE2>` stands for."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None
