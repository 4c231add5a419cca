"""Pointing at what a decoder has read: a patch of a picture, a part of it, a place in the part."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm

PLACES = 9  # three rows of three in a part


class PointHead(nn.Module):
    """Queries and keys of patches and of their parts, and the places in a part.

    Patches' keys and queries are normalised streams, turned by the order of the patches; parts'
    keys are the tower's features.
    """

    def __init__(
        self, kernels: Kernels, hidden: int, features: int, dim: int, *, theta: float, eps: float
    ) -> None:
        super().__init__()
        self.theta, self.dim = theta, dim
        self.x_norm = norm(kernels, "rms", hidden, eps)
        self.patch_q = Linear(kernels, hidden, dim, bias=True)
        self.patch_k = Linear(kernels, hidden, dim, bias=True)
        self.subpatch_q = Linear(kernels, hidden, dim, bias=True)
        self.subpatch_k = Linear(kernels, features, dim, bias=True)
        self.subpatch_loc_k = Linear(kernels, hidden, PLACES, bias=True)
        self.no_more = nn.Parameter(torch.empty(dim), requires_grad=False)
        self.part_in = Linear(kernels, features, hidden, bias=True)

    def patch_keys(self, stream: Tensor, order: Tensor) -> Tensor:
        """stream (patches, hidden) and order (patches,) to keys (patches + 1, dim): the last one's
        is that there are no more points.
        """
        keys = self.turned(self.patch_k(self.x_norm(stream)), order)
        return torch.cat((keys, self.no_more[None].to(keys)))

    def patch_scores(self, stream: Tensor, keys: Tensor, place: Tensor) -> Tensor:
        """stream (hidden,), last of a patch at `place`, to scores (patches + 1,)."""
        query = self.turned(self.patch_q(self.x_norm(stream[None])), place[None])
        return (keys @ query[0]).float()

    def part_scores(self, stream: Tensor, parts: Tensor) -> Tensor:
        """stream (hidden,) and features (parts, features) to scores (parts,)."""
        query = self.subpatch_q(self.x_norm(stream[None]))[0]
        return (self.subpatch_k(parts.to(query.dtype)) @ query).float() / self.dim**0.5

    def place_scores(self, stream: Tensor) -> Tensor:
        """stream (hidden,) to scores (places,)."""
        scores: Tensor = self.subpatch_loc_k(stream[None])[0].float()
        return scores

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        """Rope over the features of x (rows, dim) at places (rows,)."""
        half = x.shape[1] // 2
        steps = torch.arange(half, device=x.device).float() / half
        angles = places.float()[:, None] / self.theta**steps
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, dim=1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=1)
