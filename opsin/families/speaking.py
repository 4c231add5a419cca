"""Answers that hold more than the vocabulary's tokens, such as places in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Speaker(Protocol):
    """What one request may say beside the vocabulary's tokens.

    Its own tokens have ids from the vocabulary's size on; what they stand for and how they are
    embedded follows from the ids and the request's media alone, so that they are tokens as any
    other to the scheduler, the cache and the sampler. One instance belongs to one request.

    exclusive: nothing but its own answer makes sense, so that a form cannot be asked of it.
    """

    exclusive: bool

    def scores(self, stream: Tensor, logits: Tensor, said: Sequence[int]) -> Tensor:
        """The logits (vocab + own tokens,) of the next token.

        stream (hidden,) is the decoder's last, before its norm; logits (vocab,) are the model's,
        float32; `said` are the tokens generated so far.
        """
        ...

    def embeds(self, token_ids: Tensor) -> Tensor:
        """Own tokens (tokens,) to what the decoder reads in their places, (tokens, hidden)."""
        ...

    def say(self, token: int) -> str | None:
        """The text that a token adds to the answer; None leaves it to the tokenizer.

        Called once for each token, in order.
        """
        ...

    def close(self) -> str:
        """The text that ends the answer."""
        ...
