"""M-RoPE (arXiv:2409.12191): positions of text, and of grids of tokens by time, row and column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenGrid:
    """A run of media tokens: its frames, rows and columns.

    `interval` is how many positions lie between two frames; what is not whole is cut off.
    """

    frames: int
    rows: int
    columns: int
    interval: float = 1.0

    @property
    def size(self) -> int:
        """Tokens in it."""
        return self.frames * self.rows * self.columns

    def positions(self) -> Tensor:
        """Each token's place by time, row and column.  # (3, size)"""
        times = (torch.arange(self.frames) * torch.tensor(self.interval)).long()
        return torch.cartesian_prod(times, torch.arange(self.rows), torch.arange(self.columns)).T


def mrope_positions(
    count: int, media: Sequence[tuple[Tensor, Sequence[TokenGrid]]]
) -> tuple[Tensor, int]:
    """Positions (3, count) of a prompt, and that of the token after it.

    media: for each, the places of its tokens (num_tokens,) and the runs that those make. Text
    counts on all three axes, and after a run goes on behind the longer of its sides. The token
    after the prompt comes behind everything in it: a long video may reach further than the text.
    """
    parts: list[Tensor] = []
    done, position = 0, 0
    for start, grid in sorted(_placed(media), key=lambda placed: placed[0]):
        parts.append(torch.arange(position, position + start - done).expand(3, -1))
        position += start - done
        parts.append(grid.positions() + position)
        position += max(grid.rows, grid.columns)
        done = start + grid.size
    parts.append(torch.arange(position, position + count - done).expand(3, -1))
    positions = torch.cat(parts, dim=1)
    return positions, int(positions.max()) + 1 if count else 0


def _placed(
    media: Sequence[tuple[Tensor, Sequence[TokenGrid]]],
) -> list[tuple[int, TokenGrid]]:
    """Every run with the place of its first token."""
    placed = []
    for indices, grids in media:
        first = 0
        for grid in grids:
            placed.append((int(indices[first]), grid))
            first += grid.size
    return placed
