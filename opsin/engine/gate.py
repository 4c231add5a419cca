"""Lets a model think before the grammar of its answer starts."""

from __future__ import annotations

from opsin.prompt.detokenize import Detokenizer
from opsin.prompt.matching import StreamMatcher
from opsin.prompt.stream import Tag
from opsin.prompt.tokenizer import Tokenizer


class Gate:
    """Closed while a model reasons; open from where its answer begins.

    opened: the prompt ends inside the block. Otherwise the model may begin one with its first
    token, if the tag is one token. After the block, one token of line ends may stand, as models
    were trained to write it.
    """

    def __init__(self, tokenizer: Tokenizer, tag: Tag, *, opened: bool) -> None:
        self._text = Detokenizer(tokenizer, skip_special_tokens=False)
        self._end = StreamMatcher([tag.end])
        self._start = () if opened else tuple(_one_token(tokenizer, tag.start))
        self._lines = tuple(t for ends in ("\n", "\n\n") for t in _one_token(tokenizer, ends))
        self.is_open = not (opened or self._start)
        self._inside = opened
        self.may_be: tuple[int, ...] = self._start

    @property
    def at_grammar(self) -> bool:
        """Whether the answer may begin with the next token."""
        return not self._inside

    def advance(self, token: int, fits: bool) -> bool:
        """Take a token; whether it belongs to the answer. `fits`: the grammar would take it."""
        if self._inside:
            self._look_for_end(token)
            return False
        if token in self._start:
            self._start = self.may_be = ()
            self._inside = True
            return False
        self.is_open = True
        return fits or token not in self.may_be

    def _look_for_end(self, token: int) -> None:
        _, match = self._end.push(self._text.push(token))
        if match is not None:
            self._inside = False
            self.may_be = self._lines


def _one_token(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token that a text is, in a list; an empty one where it takes several."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids if len(ids) == 1 else []
