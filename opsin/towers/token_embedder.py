"""Vectors of a tower, and tokens of the same kind of media, to a decoder's embeddings by one
projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsin.kernels import Kernels
from opsin.nn.linear import Embedding, Linear
from opsin.nn.norm import norm


class TokenEmbedder(nn.Module):
    """Normalises what a tower gives, or the rows of a table of `tokens` rows, each with a norm of
    its own, projects it and normalises the result without a weight.
    """

    def __init__(
        self, kernels: Kernels, tokens: int, inside: int, outside: int, eps: float
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.table = Embedding(tokens, inside)
        self.token_norm = norm(kernels, "rms", inside, eps)
        self.media_norm = norm(kernels, "rms", inside, eps)
        self.project = Linear(kernels, inside, outside)
        self.last_norm = norm(kernels, "rms_plain", outside, eps)

    def forward(self, features: Tensor) -> Tensor:
        """A tower's features (..., inside) to embeddings (..., outside)."""
        embeds: Tensor = self.last_norm(self.project(self.media_norm(features)))
        return embeds

    def rows(self) -> Tensor:
        """The embeddings of all tokens of the table, (tokens, outside)."""
        rows = self.table(torch.arange(self.tokens, device=self.table.weight.device))
        embeds: Tensor = self.last_norm(self.project(self.token_norm(rows)))
        return embeds
