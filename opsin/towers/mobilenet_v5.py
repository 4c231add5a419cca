"""MobileNet-V5: blocks of MobileNet-V4 (arXiv:2404.10518), whose last two stages are fused into one
square of vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.kernels import Activation, Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm

EPS = 1e-6
# Pictures that go through the network together: its first layers' results are large.
GROUP = 4
ACTIVATION: Activation = "gelu_tanh"


@dataclass(frozen=True, slots=True)
class EdgeBlock:
    """A convolution of `kernel` to `expansion` times the channels, and a projection."""

    channels: int
    stride: int = 1
    kernel: int = 3
    expansion: int = 4


@dataclass(frozen=True, slots=True)
class InvertedBlock:
    """Depthwise, expanding, depthwise, projecting; a kernel of 0 leaves its convolution out."""

    channels: int
    expansion: int
    start: int = 0
    middle: int = 0
    stride: int = 1


@dataclass(frozen=True, slots=True)
class QueryBlock:
    """Attention of all heads over one key and value, which are `stride` times coarser."""

    channels: int
    heads: int
    dim: int
    stride: int = 1


Block = EdgeBlock | InvertedBlock | QueryBlock


@dataclass(frozen=True, slots=True)
class MobileNetConfig:
    """The network's shape; the result is a square of `side` vectors of `out` features."""

    stem: int
    stages: tuple[tuple[Block, ...], ...]
    out: int = 2048
    side: int = 16


def whole_eighths(channels: float) -> int:
    """A number of channels rounded to a multiple of eight, by no more than a tenth down."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def mobilenet_v5_300m(width: float = 1.0, side: int = 16) -> MobileNetConfig:
    """The encoder of 300 million parameters, or one of `width` times its channels."""
    first, second, third, fourth = (whole_eighths(n * width) for n in (128, 256, 640, 1280))
    pairs = (QueryBlock(third, 12, 64, stride=2), InvertedBlock(third, 2))
    last = (QueryBlock(fourth, 16, 96), InvertedBlock(fourth, 2))
    return MobileNetConfig(
        stem=64 if width < 1 else whole_eighths(64 * width),
        stages=(
            (EdgeBlock(first, stride=2), EdgeBlock(first), EdgeBlock(first)),
            (
                InvertedBlock(second, 6, start=3, middle=5, stride=2),
                *(InvertedBlock(second, 4, start=kernel) for kernel in (5, 3, 5, 3)),
            ),
            (
                InvertedBlock(third, 6, start=5, middle=5, stride=2),
                *(InvertedBlock(third, 4, start=5) for _ in range(7)),
                InvertedBlock(third, 1),
                *(pairs * 14),
            ),
            (InvertedBlock(fourth, 6, start=5, middle=5, stride=2), *(last * 19)),
        ),
        side=side,
    )


class Convolution(nn.Module):
    """A convolution of (pictures, height, width, channels), padded so that none is lost."""

    def __init__(
        self,
        inside: int,
        outside: int,
        kernel: int,
        stride: int = 1,
        *,
        depthwise: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.stride, self.groups = stride, inside if depthwise else 1
        shape = (outside, 1 if depthwise else inside, kernel, kernel)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(outside), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (pictures, height, width, in) to (pictures, height / stride, width / stride, out)."""
        kernel, stride = self.weight.shape[-1], self.stride
        # What is needed for the last step to fit; the odd one goes behind.
        (top, bottom), (left, right) = (
            (need // 2, need - need // 2)
            for need in (
                max(0, (math.ceil(size / stride) - 1) * stride + kernel - size)
                for size in x.shape[1:3]
            )
        )
        planes = F.pad(x, (0, 0, left, right, top, bottom)).permute(0, 3, 1, 2)
        mixed = F.conv2d(planes, self.weight, self.bias, stride, groups=self.groups)
        return mixed.permute(0, 2, 3, 1).contiguous()


class Normed(nn.Module):
    """A convolution or projection, a norm over channels and, if asked, an activation."""

    def __init__(
        self, kernels: Kernels, mix: Convolution | Linear, channels: int, *, active: bool = False
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.conv = mix
        self.norm = norm(kernels, "rms", channels, EPS)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., channels)."""
        x = self.norm(self.conv(x))
        return self.kernels.activation(x, ACTIVATION) if self.active else x


class Edge(nn.Module):
    """See `EdgeBlock`."""

    def __init__(self, kernels: Kernels, config: EdgeBlock, inside: int) -> None:
        super().__init__()
        wide = whole_eighths(inside * config.expansion)
        grow = Convolution(inside, wide, config.kernel, config.stride)
        self.expand = Normed(kernels, grow, wide, active=True)
        shrink = Linear(kernels, wide, config.channels)
        self.project = Normed(kernels, shrink, config.channels)
        self.skips = config.stride == 1 and inside == config.channels

    def forward(self, x: Tensor) -> Tensor:
        """x (pictures, height, width, in) to the same with its own channels and stride."""
        mixed = self.project(self.expand(x))
        return x + mixed if self.skips else mixed


class Inverted(nn.Module):
    """See `InvertedBlock`; without `scaled` nothing is learned of how much it adds."""

    def __init__(
        self, kernels: Kernels, config: InvertedBlock, inside: int, *, scaled: bool = True
    ) -> None:
        super().__init__()
        wide, stride = whole_eighths(inside * config.expansion), config.stride
        self.start: nn.Module = nn.Identity()
        if config.start:
            step = 1 if config.middle else stride
            mix = Convolution(inside, inside, config.start, step, depthwise=True)
            self.start = Normed(kernels, mix, inside)
        self.expand = Normed(kernels, Linear(kernels, inside, wide), wide, active=True)
        self.middle: nn.Module = nn.Identity()
        if config.middle:
            mix = Convolution(wide, wide, config.middle, stride, depthwise=True)
            self.middle = Normed(kernels, mix, wide, active=True)
        shrink = Linear(kernels, wide, config.channels)
        self.project = Normed(kernels, shrink, config.channels)
        self.scale = None
        if scaled:
            self.scale = nn.Parameter(torch.empty(config.channels), requires_grad=False)
        self.skips = scaled and stride == 1 and inside == config.channels

    def forward(self, x: Tensor) -> Tensor:
        """x (pictures, height, width, in) to the same with its own channels and stride."""
        mixed = self.project(self.middle(self.expand(self.start(x))))
        mixed = mixed if self.scale is None else mixed * self.scale
        return x + mixed if self.skips else mixed


class Coarser(nn.Module):
    """One key or value for the picture: made coarser where asked, then projected."""

    def __init__(self, kernels: Kernels, config: QueryBlock) -> None:
        super().__init__()
        self.down: nn.Module = nn.Identity()
        if config.stride > 1:
            width = config.channels
            mix = Convolution(width, width, 3, config.stride, depthwise=True)
            self.down = Normed(kernels, mix, width)
        self.proj = Linear(kernels, config.channels, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (pictures, height, width, channels) to (vectors, 1, dim), picture after picture."""
        return self.proj(self.down(x)).flatten(0, 2)[:, None]


class MultiQuery(nn.Module):
    """See `QueryBlock`."""

    def __init__(self, kernels: Kernels, config: QueryBlock) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        width = config.heads * config.dim
        self.norm = norm(kernels, "rms", config.channels, EPS)
        self.query = Linear(kernels, config.channels, width)
        self.key = Coarser(kernels, config)
        self.value = Coarser(kernels, config)
        self.out = Linear(kernels, width, config.channels)
        self.scale = nn.Parameter(torch.empty(config.channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (pictures, height, width, channels) to the same shape."""
        heads, dim = self.config.heads, self.config.dim
        normed = self.norm(x)
        attended = self.kernels.dense_attention(
            self.query(normed).flatten(0, 2).unflatten(1, (heads, dim)),
            self.key(normed),
            self.value(normed),
            [x.shape[1] * x.shape[2]] * len(x),
            scale=dim**-0.5,
        )
        return x + self.out(attended.flatten(1)).view_as(x) * self.scale


def block(kernels: Kernels, config: Block, inside: int) -> nn.Module:
    """A block of the kind that its config is of, behind `inside` channels."""
    if isinstance(config, EdgeBlock):
        return Edge(kernels, config, inside)
    if isinstance(config, InvertedBlock):
        return Inverted(kernels, config, inside)
    return MultiQuery(kernels, config)


class Fusion(nn.Module):
    """Feature maps of two stages, the coarser one enlarged, mixed and brought to one size."""

    def __init__(self, kernels: Kernels, channels: int, config: MobileNetConfig) -> None:
        super().__init__()
        self.side = config.side
        self.mix = Inverted(kernels, InvertedBlock(config.out, 2), channels, scaled=False)
        self.norm = norm(kernels, "rms", config.out, EPS)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps of (pictures, height, width, channels) to (pictures, side * side, out)."""
        planes = [x.permute(0, 3, 1, 2) for x in maps]
        size = planes[0].shape[-2:]
        planes = [x if x.shape[-2:] == size else F.interpolate(x, size) for x in planes]
        x = self.mix(torch.cat(planes, dim=1).permute(0, 2, 3, 1).contiguous())
        if tuple(size) != (self.side, self.side):
            x = self._resized(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(x.contiguous()).flatten(1, 2)

    def _resized(self, planes: Tensor) -> Tensor:
        """planes (pictures, channels, height, width) at the side's size: means where they fit."""
        height, width = planes.shape[-2:]
        if height % self.side or width % self.side:
            return F.interpolate(planes, (self.side, self.side), mode="bilinear")
        return F.avg_pool2d(planes, (height // self.side, width // self.side))


class MobileNetV5(nn.Module):
    """Stem, four stages, each half as large as the one before, and the fusion of the last two."""

    def __init__(self, kernels: Kernels, config: MobileNetConfig) -> None:
        super().__init__()
        self.stem = Normed(
            kernels, Convolution(3, config.stem, 3, 2, bias=True), config.stem, active=True
        )
        self.blocks = nn.ModuleList()
        inside = config.stem
        for stage in config.stages:
            parts = nn.ModuleList()
            for part in stage:
                parts.append(block(kernels, part, inside))
                inside = part.channels
            self.blocks.append(parts)
        fused = sum(stage[-1].channels for stage in config.stages[-2:])
        self.fusion = Fusion(kernels, fused, config)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (pictures, 3, height, width) to (pictures, side * side, out)."""
        return torch.cat([self._together(part) for part in pixels.split(GROUP)])

    def _together(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels.to(self.stem.conv.weight).permute(0, 2, 3, 1))
        maps = []
        for stage in self.blocks:
            assert isinstance(stage, nn.ModuleList)
            for part in stage:
                x = part(x)
            maps.append(x)
        fused: Tensor = self.fusion(maps[-2:])
        return fused
