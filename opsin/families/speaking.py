"""Answers that hold more than the vocabulary's tokens, such as places in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from opsin.families.base import Encoded


class Speaker(Protocol):
    """What one request may say beside the vocabulary's tokens.

    Its own tokens have ids from the vocabulary's size on; what they stand for and how they are
    embedded follows from the ids and the request's media alone, so that they are tokens as any
    other to the scheduler, the cache and the sampler. One instance belongs to one request.

    reads: tokens of the prompt, in order, whose last stream it has to see before it chooses; such a
    request computes its whole prompt itself.
    exclusive: nothing but its own answer makes sense, so that a form cannot be asked of it.
    """

    exclusive: bool
    reads: Sequence[int]

    def see(self, index: int, encoded: Encoded) -> None:
        """Take what the towers made of the request's medium number `index`."""
        ...

    def read(self, places: Sequence[int], stream: Tensor) -> None:
        """Take the stream (places, hidden) at some of `reads`."""
        ...

    def scores(self, stream: Tensor, logits: Tensor, said: Sequence[int]) -> Tensor:
        """The logits (vocab + own tokens,) of the next token.

        stream (hidden,) is the decoder's last, before its norm; logits (vocab,) are the model's,
        float32; `said` are the tokens generated so far.
        """
        ...

    def embeds(self, token_ids: Tensor, before: Sequence[int]) -> Tensor:
        """Own tokens (tokens,) to what the decoder reads in their places, (tokens, hidden).

        before (tokens,) are the tokens that come right before each.
        """
        ...

    def say(self, token: int) -> str | None:
        """The text that a token adds to the answer; None leaves it to the tokenizer.

        Called once for each token, in order.
        """
        ...

    def close(self) -> str:
        """The text that ends the answer."""
        ...
