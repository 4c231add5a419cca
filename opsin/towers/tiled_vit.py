"""A vision transformer over all tiles of a picture at once, with gated embeddings of the tiling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.kernels import Kernels
from opsin.kernels.interface import attend
from opsin.nn.linear import Embedding, Linear
from opsin.nn.norm import norm
from opsin.towers.vit import VisionMLP, ViTConfig

# The tokens of a tile are padded to a multiple of this, as the weights were trained.
PAD = 8


@dataclass(frozen=True, slots=True)
class TiledConfig:
    """The tower's shape: `vit` for its layers, then `global_layers` more that are gated.

    Every picture has `tiles` tiles of `vit.positions` tokens, the class token included; the tiling
    is one of `tilings`, 0 among them for none. The features are the last layer's and those after
    the layers `taps`.
    """

    vit: ViTConfig
    global_layers: int
    tiles: int
    tilings: int
    taps: tuple[int, ...]


class TiledLayer(nn.Module):
    """Attention over all of a picture's tokens, then an MLP; with `gated`, behind learned gates."""

    def __init__(self, kernels: Kernels, config: ViTConfig, *, gated: bool) -> None:
        super().__init__()
        hidden = config.hidden
        self.heads = config.heads
        self.scale = (hidden // config.heads) ** -0.5
        self.attention_norm = norm(kernels, "layer", hidden, config.norm_eps)
        self.attention = nn.ModuleDict(
            {
                "qkv": Linear(kernels, hidden, (hidden,) * 3),
                "out": Linear(kernels, hidden, hidden),
            }
        )
        self.mlp_norm = norm(kernels, "layer", hidden, config.norm_eps)
        self.mlp = VisionMLP(kernels, config)
        self.gates: nn.Parameter | None = None
        if gated:
            self.gates = nn.Parameter(torch.empty(2), requires_grad=False)

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """The gate of the attention (0) or of the MLP (1), to fill."""
        return self.get_parameter(name).data[index[0] : index[0] + 1]

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """x (tokens, hidden) of one picture to the same shape; real (tokens,) marks no padding."""
        attended = self.attend(self.attention_norm(x), real)
        if self.gates is not None:
            attended = attended * self.gates[0].tanh()
        x = x + attended
        mixed = self.mlp(self.mlp_norm(x))
        return x + (mixed if self.gates is None else mixed * self.gates[1].tanh())

    def attend(self, x: Tensor, real: Tensor) -> Tensor:
        """Real tokens see all tokens, the padding too; padding sees the real ones only.

        So the reference computes it, and so the weights expect it.
        """
        query, key, value = self.attention["qkv"](x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        out = torch.empty_like(query)
        out[real] = attend(query[real], key, value, None, self.scale, None, None)
        out[~real] = attend(query[~real], key[real], value[real], None, self.scale, None, None)
        return self.attention["out"](out.flatten(1))


class TiledTransformer(nn.Module):
    """Tiles to features, one picture after another."""

    def __init__(self, kernels: Kernels, config: TiledConfig) -> None:
        super().__init__()
        self.config = config
        vit = config.vit
        hidden, tiles = vit.hidden, config.tiles
        self.patch = Linear(kernels, vit.patch_dim, hidden)
        self.class_token = nn.Parameter(torch.empty(hidden), requires_grad=False)
        self.positions = nn.Parameter(torch.empty(vit.positions, hidden), requires_grad=False)
        self.tile_positions = Embedding(config.tilings, tiles * vit.positions * hidden)
        self.before = Embedding(config.tilings, tiles * hidden)
        self.after = Embedding(config.tilings, tiles * hidden)
        # Of the positions, of what is added before the layers, and after them.
        self.gates = nn.Parameter(torch.empty(3), requires_grad=False)
        self.pre_norm = norm(kernels, "layer", hidden, 1e-5)
        self.post_norm = norm(kernels, "layer", hidden, 1e-5)
        self.layers = nn.ModuleList(
            TiledLayer(kernels, vit, gated=False) for _ in range(vit.layers)
        )
        self.global_layers = nn.ModuleList(
            TiledLayer(kernels, vit, gated=True) for _ in range(config.global_layers)
        )

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        """One of the gates, to fill."""
        return self.get_parameter(name).data[index[0] : index[0] + 1]

    def forward(self, patches: Tensor, tiling: Tensor, count: int) -> Tensor:
        """One picture's patches (tiles, patches, patch_dim), of which `count` tiles are real.

        tiling (1,) names the arrangement. Returns (tiles * positions, hidden * (1 + taps)).
        """
        config, tiles = self.config, self.config.tiles
        x = self.pre_norm(self.embedded(patches, tiling))  # (tiles, positions, hidden)
        length = x.shape[1]
        x = F.pad(x, (0, 0, 0, -length % PAD))
        real = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        real[:count, :length] = True
        x, real = x.flatten(0, 1), real.flatten()
        tapped = {}
        for i, layer in enumerate(self.layers):
            x = layer(x, real)
            if i in config.taps:
                tapped[i] = x
        x = self.post_norm(x).unflatten(0, (tiles, -1))
        after = self.after(tiling).view(tiles, 1, -1)
        x = (x + after * self.gates[2].tanh()).flatten(0, 1)
        for layer in self.global_layers:
            x = layer(x, real)
        inner = torch.stack([tapped[i] for i in config.taps], dim=-1).flatten(1)
        features = torch.cat((x, inner), dim=-1)
        return features.unflatten(0, (tiles, -1))[:, :length].flatten(0, 1)

    def embedded(self, patches: Tensor, tiling: Tensor) -> Tensor:
        """Patches with the class token before them and all position embeddings added."""
        tiles, positions = self.config.tiles, self.config.vit.positions
        gates = self.gates.tanh()
        x = self.patch(patches) + self.before(tiling).view(tiles, 1, -1) * gates[1]
        x = torch.cat((self.class_token.expand(tiles, 1, -1), x), dim=1)
        x = x + (1 - gates[0]) * self.positions
        return x + gates[0] * self.tile_positions(tiling).view(tiles, positions, -1)
