"""A vision transformer whose patches are what another encoder saw there."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from opsin.kernels import Kernels
from opsin.nn.linear import Embedding
from opsin.nn.norm import norm
from opsin.towers.sam import resized_table
from opsin.towers.vit import VisionLayer, ViTConfig


class FeatureTransformer(nn.Module):
    """CLIP's layers, class token and position table, without its patches (arXiv:2103.00020).

    The table has `positions` rows, the class token's first and then those of a square.
    """

    def __init__(self, kernels: Kernels, config: ViTConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.class_token = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.positions = Embedding(config.positions, hidden)
        self.pre_norm = norm(kernels, config.norm, hidden, config.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(kernels, config) for _ in range(config.layers))

    def placed(self, side: int) -> Tensor:
        """The rows for the class token and a square of side x side.  # (1 + side * side, hidden)"""
        table = self.positions.get_parameter("weight")
        own = math.isqrt(len(table) - 1)
        square = resized_table(table[1:].unflatten(0, (own, own)), side, side)
        return torch.cat((table[:1], square.flatten(0, 1)))

    def forward(self, features: Tensor) -> Tensor:
        """Square maps (pictures, patches, hidden) to the same shape, the class token left out."""
        pictures, patches, _ = features.shape
        token = self.class_token.expand(pictures, 1, -1)
        x = torch.cat((token, features), dim=1) + self.placed(math.isqrt(patches))
        x = self.pre_norm(x).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, [patches + 1] * pictures, None)
        return x.unflatten(0, (pictures, patches + 1))[:, 1:]
