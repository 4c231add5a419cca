"""The image encoder of Segment Anything (arXiv:2304.02643): windows, decomposed relative positions,
and a neck of convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.kernels import Activation, Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import LayerNorm
from opsin.towers import pixels

# Elements of the relative bias that one call of attention may hold: 64 MiB in float32.
MAX_BIAS = 1 << 24


@dataclass(frozen=True, slots=True)
class SamConfig:
    """The encoder's shape. `grid` is the patches along an edge of the pictures it was trained on.

    Layers `whole` see the whole picture, the others windows of `window` patches. `neck` is the
    width of what comes out, which convolutions of stride 2 then take to each of `reductions`.
    """

    hidden: int
    layers: int
    heads: int
    mlp_hidden: int
    patch: int
    grid: int
    window: int
    whole: frozenset[int]
    neck: int
    reductions: tuple[int, ...] = ()
    activation: Activation = "gelu"
    norm_eps: float = 1e-6
    qkv_bias: bool = True


class Convolution(nn.Module):
    """A convolution without bias over maps (images, channels, height, width)."""

    def __init__(self, in_features: int, out_features: int, size: int, stride: int = 1) -> None:
        super().__init__()
        shape = (out_features, in_features, size, size)
        self.weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """x (images, in, height, width) to (images, out, height / stride, width / stride)."""
        return F.conv2d(x, self.weight, stride=self.stride, padding=self.weight.shape[-1] // 2)


class SamAttention(nn.Module):
    """Attention inside squares of `side` patches, biased by how far apart rows and columns are."""

    def __init__(self, kernels: Kernels, config: SamConfig, side: int) -> None:
        super().__init__()
        self.kernels = kernels
        self.heads = config.heads
        head_dim = config.hidden // config.heads
        self.scale = head_dim**-0.5
        self.qkv = Linear(kernels, config.hidden, (config.hidden,) * 3, bias=config.qkv_bias)
        self.out = Linear(kernels, config.hidden, config.hidden, bias=True)
        shape = (2 * side - 1, head_dim)
        self.row_offsets = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.column_offsets = nn.Parameter(torch.empty(shape), requires_grad=False)

    def bias(self, query: Tensor, height: int, width: int) -> Tensor:
        """What is added to the scores of query (runs, height * width, heads, dim).

        Returns (runs, heads, height * width, height * width).
        """
        grid = query.unflatten(1, (height, width))
        by_row = torch.einsum("ryxhd,ykd->rhyxk", grid, _between(self.row_offsets, height))
        by_column = torch.einsum("ryxhd,xkd->rhyxk", grid, _between(self.column_offsets, width))
        return (by_row[..., :, None] + by_column[..., None, :]).flatten(4).flatten(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x (runs, height, width, hidden) to the same shape."""
        runs, height, width, _ = x.shape
        length = height * width
        parts = self.qkv(x).flatten(0, 2).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.unbind(1)  # (runs * length, heads, dim)
        step = max(1, MAX_BIAS // (runs * length * length))
        attended = []
        for start in range(0, self.heads, step):
            some = slice(start, start + step)
            bias = self.bias(query[:, some].unflatten(0, (runs, length)), height, width)
            attended.append(
                self.kernels.dense_attention(
                    query[:, some].contiguous(),
                    key[:, some].contiguous(),
                    value[:, some].contiguous(),
                    [length] * runs,
                    scale=self.scale,
                    bias=bias,
                )
            )
        return self.out(torch.cat(attended, dim=1).flatten(1)).view(x.shape)


def _between(table: Tensor, side: int) -> Tensor:
    """The row of a table of distances for each pair along an edge: (side, side, dim).

    A table for another edge is stretched linearly, as the authors do.
    """
    wanted = 2 * side - 1
    if len(table) != wanted:
        stretched = F.interpolate(table.T[None].float(), size=wanted, mode="linear")
        table = stretched[0].T.to(table.dtype)
    steps = torch.arange(side, device=table.device)
    return table[steps[:, None] - steps + side - 1]


class SamLayer(nn.Module):
    """Attention, in windows or over the whole picture, and a network of two layers."""

    def __init__(self, kernels: Kernels, config: SamConfig, window: int | None) -> None:
        super().__init__()
        self.kernels = kernels
        self.window = window
        self.activation: Activation = config.activation
        hidden, inner = config.hidden, config.mlp_hidden
        self.attention_norm = LayerNorm(kernels, hidden, config.norm_eps)
        self.attention = SamAttention(kernels, config, window or config.grid)
        self.mlp_norm = LayerNorm(kernels, hidden, config.norm_eps)
        self.up = Linear(kernels, hidden, inner, bias=True)
        self.down = Linear(kernels, inner, hidden, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """x (images, height, width, hidden) to the same shape."""
        normed = self.attention_norm(x)
        if self.window is None:
            x = x + self.attention(normed)
        else:
            height, width = x.shape[1:3]
            windows, grid = _windows(normed, self.window)
            x = x + _together(self.attention(windows), grid)[:, :height, :width]
        inner = self.up.activated(self.mlp_norm(x), self.activation)
        return x + self.down(inner)


def _windows(x: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """Squares of `side` patches, (images * rows * columns, side, side, hidden), and their grid.

    Zeros fill the last ones; attention sees them, as the authors' does.
    """
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    cut = padded.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return cut.flatten(0, 2), (cut.shape[1], cut.shape[2])


def _together(windows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Squares side by side again: (images, rows * side, columns * side, hidden)."""
    cut = windows.unflatten(0, (-1, *grid)).transpose(2, 3)
    return cut.flatten(3, 4).flatten(1, 2)


class SamNeck(nn.Module):
    """To another width: a projection and a convolution, each normalised."""

    def __init__(self, kernels: Kernels, hidden: int, width: int) -> None:
        super().__init__()
        self.neck = Linear(kernels, hidden, width)
        self.neck_norm = LayerNorm(kernels, width, 1e-6)
        self.mix = Convolution(width, width, 3)
        self.mix_norm = LayerNorm(kernels, width, 1e-6)

    def narrowed(self, x: Tensor) -> Tensor:
        """x (images, rows, columns, hidden) to a map (images, width, rows, columns)."""
        mixed = self.mix(self.neck_norm(self.neck(x)).permute(0, 3, 1, 2))
        return self.mix_norm(mixed.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


class SamEncoder(SamNeck):
    """Pictures to a map of features."""

    def __init__(self, kernels: Kernels, config: SamConfig) -> None:
        super().__init__(kernels, config.hidden, config.neck)
        self.config = config
        self.patch = Linear(kernels, 3 * config.patch**2, config.hidden, bias=True)
        shape = (config.grid, config.grid, config.hidden)
        self.positions = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.layers = nn.ModuleList(
            SamLayer(kernels, config, None if i in config.whole else config.window)
            for i in range(config.layers)
        )
        self.reductions = halvings((config.neck, *config.reductions))

    def states(self, values: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """What comes out of the layers `taps`, in rising order, each (images, rows, columns,
        hidden), for pixels (images, 3, height, width).
        """
        rows, columns = (size // self.config.patch for size in values.shape[-2:])
        cut = pixels.patchify(values.to(self.positions), self.config.patch)
        x = self.patch(cut).unflatten(0, (len(values), rows, columns))
        x = x + resized_table(self.positions, rows, columns)
        tapped = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in taps:
                tapped.append(x)
        return tapped

    def forward(self, values: Tensor) -> Tensor:
        """Pixels (images, 3, height, width) to a map (images, channels, rows, columns)."""
        (last,) = self.states(values, (self.config.layers - 1,))
        x = self.narrowed(last)
        for reduction in self.reductions:
            x = reduction(x)
        return x


class SamDetail(SamNeck):
    """An earlier state of the encoder added to its result, both at the size of another tower's map.

    DeepSeek-VL's (arXiv:2403.05525): the state goes through a neck of its own; two convolutions of
    stride 2 widen both maps, and the earlier one counts `early_scale` times.
    """

    def __init__(self, kernels: Kernels, config: SamConfig) -> None:
        super().__init__(kernels, config.hidden, config.neck)
        self.reductions = halvings((config.neck, 2 * config.neck, 4 * config.neck))
        self.early_scale = nn.Parameter(torch.empty(1), requires_grad=False)

    def reduced(self, x: Tensor, side: int) -> Tensor:
        """A map (images, channels, rows, columns) to (images, side * side, 4 * channels)."""
        x = F.interpolate(x, size=(4 * side, 4 * side), mode="bilinear", align_corners=False)
        for reduction in self.reductions:
            x = reduction(x)
        return x.flatten(2).transpose(1, 2)

    def forward(self, encoder: SamEncoder, values: Tensor, early: int, side: int) -> Tensor:
        """Pixels (images, 3, height, width) to features (images, side * side, 4 * channels)."""
        last = encoder.config.layers - 1
        states = encoder.states(values, (early, last))
        result = self.reduced(encoder.narrowed(states[-1]), side)
        return result + self.reduced(self.narrowed(states[0]), side) * self.early_scale


def halvings(widths: Sequence[int]) -> nn.ModuleList:
    """Convolutions of stride 2 from each of the widths to the next."""
    return nn.ModuleList(
        Convolution(before, after, 3, stride=2) for before, after in pairwise(widths)
    )


def resized_table(table: Tensor, rows: int, columns: int) -> Tensor:
    """A table of positions (side, side, hidden) for another grid, (rows, columns, hidden)."""
    if table.shape[:2] == (rows, columns):
        return table
    first = table.permute(2, 0, 1)[None].float()
    resized = F.interpolate(
        first, size=(rows, columns), mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0].permute(1, 2, 0).to(table.dtype)
