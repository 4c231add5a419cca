"""DaViT (arXiv:2204.03645): attention among the places of a window, then among the channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.decoder.config import PlainMLPConfig
from opsin.decoder.mlp import PlainMLP
from opsin.kernels import Activation, Kernels
from opsin.nn.linear import Embedding, Linear
from opsin.nn.norm import norm

# Most places of the first stage's grid that go through the tower together, one picture at least.
GROUP_PLACES = 1 << 17
EPS = 1e-5


@dataclass(frozen=True, slots=True)
class DaViTStage:
    """A convolution that shrinks the grid, and `depth` pairs of blocks after it.

    `norm_first` normalises before the convolution instead of after it. `groups` is how many sets
    the channels fall into, each of which attends to itself.
    """

    hidden: int
    patch: int
    stride: int
    padding: int
    norm_first: bool
    depth: int
    heads: int
    groups: int

    def side(self, side: int) -> int:
        """How many places a side of so many becomes."""
        return (side + 2 * self.padding - self.patch) // self.stride + 1


@dataclass(frozen=True, slots=True)
class DaViTConfig:
    """The tower's stages; `window` is the side of the squares that attend to themselves."""

    stages: tuple[DaViTStage, ...]
    window: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    activation: Activation = "gelu"
    channels: int = 3

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The grid, (rows, columns), that pixels of this height and width become."""
        for stage in self.stages:
            height, width = stage.side(height), stage.side(width)
        return height, width


class Convolution(nn.Module):
    """A convolution over grids whose features come last."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int,
        *,
        stride: int = 1,
        padding: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        shape = (out_features, in_features // groups, size, size)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)
        self.stride, self.padding, self.groups = stride, padding, groups

    def forward(self, x: Tensor) -> Tensor:
        """x (pictures, height, width, in) to (pictures, new height, new width, out)."""
        maps = F.conv2d(
            x.permute(0, 3, 1, 2),
            self.weight,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )
        return maps.permute(0, 2, 3, 1).contiguous()


class ConvolutionEmbedding(nn.Module):
    """A stage's convolution with a norm before or after it."""

    def __init__(self, kernels: Kernels, stage: DaViTStage, in_features: int) -> None:
        super().__init__()
        self.norm_first = stage.norm_first
        self.conv = Convolution(
            in_features, stage.hidden, stage.patch, stride=stage.stride, padding=stage.padding
        )
        width = in_features if stage.norm_first else stage.hidden
        self.norm = norm(kernels, "layer", width, EPS)

    def forward(self, x: Tensor) -> Tensor:
        """x (pictures, height, width, in) to (pictures, new height, new width, hidden)."""
        return self.conv(self.norm(x)) if self.norm_first else self.norm(self.conv(x))


class WindowAttention(nn.Module):
    """Attention inside squares; the grid is filled up with zeros to whole ones."""

    def __init__(self, kernels: Kernels, config: DaViTConfig, stage: DaViTStage) -> None:
        super().__init__()
        self.kernels = kernels
        self.window = config.window
        self.heads = stage.heads
        self.scale = (stage.hidden // stage.heads) ** -0.5
        widths = (stage.hidden,) * 3
        self.qkv = Linear(kernels, stage.hidden, widths, bias=config.qkv_bias)
        self.out = Linear(kernels, stage.hidden, stage.hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (pictures, height, width, hidden) to the same shape."""
        side = self.window
        pictures, height, width, _ = x.shape
        if width % side or height % side:
            x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        squares = x.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
        parts = self.qkv(squares.flatten(0, 4)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        lengths = [side * side] * (pictures * rows * columns)
        attended = self.kernels.dense_attention(query, key, value, lengths, scale=self.scale)
        out = self.out(attended.flatten(1)).view(squares.shape).transpose(2, 3)
        return out.flatten(3, 4).flatten(1, 2)[:, :height, :width]


class ChannelAttention(nn.Module):
    """Attention among the channels of a group, each seen as all its values over the grid."""

    def __init__(self, kernels: Kernels, config: DaViTConfig, stage: DaViTStage) -> None:
        super().__init__()
        self.groups = stage.groups
        widths = (stage.hidden,) * 3
        self.qkv = Linear(kernels, stage.hidden, widths, bias=config.qkv_bias)
        self.out = Linear(kernels, stage.hidden, stage.hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (pictures, height, width, hidden) to the same shape."""
        places = x.flatten(1, 2)
        parts = self.qkv(places).chunk(3, dim=-1)
        query, key, value = (  # each (pictures, groups, places, channels of a group)
            part.unflatten(-1, (self.groups, -1)).transpose(1, 2) for part in parts
        )
        # Scaled before the sum over many places, which float16 could not hold.
        scores = (query * query.shape[2] ** -0.5).mT @ key
        mixed = value @ scores.float().softmax(dim=-1).to(value.dtype).mT
        return self.out(mixed.transpose(1, 2).flatten(2)).view(x.shape)


class DaViTBlock(nn.Module):
    """Attention and MLP, each behind a depthwise convolution and a norm, all of them added."""

    def __init__(
        self,
        kernels: Kernels,
        config: DaViTConfig,
        stage: DaViTStage,
        over: Literal["window", "channels"],
    ) -> None:
        super().__init__()
        hidden = stage.hidden
        self.attention_conv = Convolution(hidden, hidden, 3, groups=hidden)
        self.attention_norm = norm(kernels, "layer", hidden, EPS)
        kind = WindowAttention if over == "window" else ChannelAttention
        self.attention = kind(kernels, config, stage)
        self.mlp_conv = Convolution(hidden, hidden, 3, groups=hidden)
        self.mlp_norm = norm(kernels, "layer", hidden, EPS)
        mlp = PlainMLPConfig(int(hidden * config.mlp_ratio), config.activation)
        self.mlp = PlainMLP(kernels, mlp, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x (pictures, height, width, hidden) to the same shape."""
        x = x + self.attention_conv(x)
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp_conv(x)
        return x + self.mlp(self.mlp_norm(x))


class DaViT(nn.Module):
    """Pictures to a grid of features."""

    def __init__(self, kernels: Kernels, config: DaViTConfig) -> None:
        super().__init__()
        self.config = config
        widths = (config.channels, *(stage.hidden for stage in config.stages))
        self.embeddings = nn.ModuleList(
            ConvolutionEmbedding(kernels, stage, width)
            for stage, width in zip(config.stages, widths, strict=False)
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    nn.Sequential(
                        DaViTBlock(kernels, config, stage, "window"),
                        DaViTBlock(kernels, config, stage, "channels"),
                    )
                    for _ in range(stage.depth)
                )
            )
            for stage in config.stages
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (pictures, channels, height, width) to (pictures, rows, columns, hidden).

        A few pictures at a time go through, which bounds the memory between the blocks.
        """
        first = self.config.stages[0]
        places = first.side(pixels.shape[2]) * first.side(pixels.shape[3])
        groups = pixels.split(max(1, GROUP_PLACES // places))
        return torch.cat([self._run(group) for group in groups])

    def _run(self, pixels: Tensor) -> Tensor:
        x = pixels.permute(0, 2, 3, 1).contiguous()
        for embedding, stage in zip(self.embeddings, self.stages, strict=True):
            x = stage(embedding(x))
        return x


class GridProjector(nn.Module):
    """A grid with learned positions to tokens: its mean, then every place, row by row.

    `frames` is the table of positions in time; a picture is the first of one frame.
    """

    def __init__(
        self, kernels: Kernels, in_features: int, out_features: int, side: int, frames: int
    ) -> None:
        super().__init__()
        rows = in_features // 2
        self.rows = Embedding(side, rows)
        self.columns = Embedding(side, in_features - rows)
        self.frames = Embedding(frames, in_features)
        self.projection = Linear(kernels, in_features, out_features)
        self.norm = norm(kernels, "layer", out_features, EPS)

    def forward(self, grid: Tensor) -> Tensor:
        """grid (pictures, rows, columns, in) to (pictures, 1 + rows * columns, out)."""
        height, width = grid.shape[1:3]
        columns = self.columns.weight[:width].expand(height, -1, -1)
        rows = self.rows.weight[:height, None].expand(-1, width, -1)
        x = grid + torch.cat((columns, rows), dim=-1) + self.frames.weight[0]
        places = x.flatten(1, 2)
        tokens = torch.cat((places.mean(dim=1, keepdim=True), places), dim=1)
        return self.norm(self.projection(tokens))
