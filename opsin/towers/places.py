"""Places in a picture, read from a decoder's stream and written back into it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm

# A size's bin b of any number of bins is the share 2 ** (b / 1023 * 10 - 10) of a side.
LAST_BIN, OCTAVES = 1023.0, 10.0


class Fourier(nn.Module):
    """Numbers as cosines and sines at learned frequencies (arXiv:2006.10739), then a linear map."""

    def __init__(self, kernels: Kernels, numbers: int, features: int, hidden: int) -> None:
        super().__init__()
        shape = (numbers, features // 2)
        self.frequencies = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.out = Linear(kernels, features, hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, numbers) to (rows, hidden)."""
        angles = 2 * math.pi * x.to(self.frequencies.dtype) @ self.frequencies
        encoded: Tensor = self.out(torch.cat((angles.cos(), angles.sin()), dim=-1))
        return encoded


class PlaceHead(nn.Module):
    """Coordinates and sizes as shares of a picture's sides, each in so many bins."""

    def __init__(
        self,
        kernels: Kernels,
        hidden: int,
        *,
        features: tuple[int, int],
        bins: tuple[int, int],
        eps: float | None,
    ) -> None:
        """`features` and `bins` are a coordinate's and a size's; without `eps`, no norm."""
        super().__init__()
        self.bins = bins
        self.norm: nn.Module = nn.Identity()
        if eps is not None:
            self.norm = norm(kernels, "layer", hidden, eps)
        self.coord_in = Fourier(kernels, 1, features[0], hidden)
        self.coord_out = Linear(kernels, hidden, bins[0], bias=True)
        self.size_in = Fourier(kernels, 2, features[1], hidden)
        self.size_out = Linear(kernels, hidden, 2 * bins[1], bias=True)

    def coordinate(self, state: Tensor) -> int:
        """The likeliest bin of a coordinate; state (hidden,)."""
        return int(self.coord_out(self.norm(state[None])).argmax())

    def size(self, state: Tensor) -> tuple[int, int]:
        """The likeliest bins of width and height; state (hidden,)."""
        wide, high = self.size_out(self.norm(state[None])).view(2, -1).argmax(dim=-1).tolist()
        return wide, high

    def embed_coordinates(self, bins: Tensor) -> Tensor:
        """Bins (rows,) to (rows, hidden)."""
        encoded: Tensor = self.coord_in(bins[:, None].float() / self.bins[0])
        return encoded

    def embed_sizes(self, bins: Tensor) -> Tensor:
        """Bins (rows, 2) to (rows, hidden)."""
        encoded: Tensor = self.size_in(torch.exp2(bins.float() / LAST_BIN * OCTAVES - OCTAVES))
        return encoded


def share_of_bin(size: int) -> float:
    """What share of a side a size's bin stands for."""
    return float(2.0 ** (size / LAST_BIN * OCTAVES - OCTAVES))
