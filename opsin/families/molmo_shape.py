"""What Molmo and its descendants share: blocks, tower names, and crops that overlap."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.checkpoint.safetensors import StoredTensor
from opsin.checkpoint.weights import Rename
from opsin.errors import InputError
from opsin.quant.mlx import band
from opsin.towers import overlapping, pixels

# The decoder behind its prefix, and the tower behind "towers.vision.".
BLOCK_RENAME: tuple[Rename, ...] = (
    (r"^decoder\.wte\.embedding$", "decoder.embedding.weight[0]"),
    (r"^decoder\.wte\.new_embedding$", "decoder.embedding.weight[1]"),
    (r"^decoder\.ln_f\.", "decoder.norm."),
    (r"^decoder\.ff_out\.", "decoder.head."),
    (r"^decoder\.blocks\.(\d+)\.(self_attn\.|mlp\.)?", r"decoder.layers.\1."),
    (r"^(decoder\.layers\.\d+)\.att_proj\.", r"\1.attention.qkv."),
    (r"^(decoder\.layers\.\d+)\.attn_out\.", r"\1.attention.out."),
    (r"^(decoder\.layers\.\d+)\.ff_out\.", r"\1.mlp.down."),
    (r"^(decoder\.layers\.\d+)\.ff_proj_up\.weight$", r"\1.mlp.gate_up.weight[1]"),
    (r"^(decoder\.layers\.\d+)\.ff_proj_gate\.weight$", r"\1.mlp.gate_up.weight[0]"),
)
TOWER_RENAME: tuple[Rename, ...] = (
    (r"^(towers\.vision\.)class_embedding$", r"\1class_token"),
    (r"^(towers\.vision\.)positional_embedding$", r"\1positions.weight"),
    (r"^(towers\.vision\.)patch_embedding\.", r"\1patch."),
    (r"^(towers\.vision\.)pre_ln\.", r"\1pre_norm."),
    (r"^(towers\.vision\.)(transformer\.)?resblocks\.", r"\1layers."),
    (r"^(towers\.vision\..*\.attention)\.wq\.(\w+)$", r"\1.qkv.\2[0]"),
    (r"^(towers\.vision\..*\.attention)\.wk\.(\w+)$", r"\1.qkv.\2[1]"),
    (r"^(towers\.vision\..*\.attention)\.wv\.(\w+)$", r"\1.qkv.\2[2]"),
    (r"^(towers\.vision\..*\.attention)\.wo\.", r"\1.out."),
    (r"^(towers\.vision\..*)\.feed_forward\.w1\.", r"\1.mlp.up."),
    (r"^(towers\.vision\..*)\.feed_forward\.w2\.", r"\1.mlp.down."),
    (r"^(towers\.vision\..*)\.ffn_norm\.", r"\1.mlp_norm."),
    (r"^towers\.pooling\.wq\.", "towers.pooling.query."),
    (r"^towers\.pooling\.wk\.(\w+)$", r"towers.pooling.key_value.\1[0]"),
    (r"^towers\.pooling\.wv\.(\w+)$", r"towers.pooling.key_value.\1[1]"),
    (r"^towers\.pooling\.wo\.", "towers.pooling.out."),
    (r"^towers\.projector\.w1\.weight$", "towers.projector.gate_up.weight[0]"),
    (r"^towers\.projector\.w3\.weight$", "towers.projector.gate_up.weight[1]"),
    (r"^towers\.projector\.w2\.", "towers.projector.down."),
)


def halves(tensor: StoredTensor, fused: str = r"\.ff_proj\.weight$") -> Sequence[StoredTensor]:
    """A feed-forward block's first product, in which the gate comes last, as its two halves.

    `fused` is a pattern of the names of such products; theirs get "_up" and "_gate".
    """
    if not re.search(fused, tensor.name):
        return (tensor,)
    middle, end = tensor.shape[0] // 2, tensor.shape[0]
    layer = tensor.name.removesuffix(".weight")
    return [
        replace(part, name=f"{layer}_{name}.weight")
        for name, part in (("up", band(tensor, 0, middle)), ("gate", band(tensor, middle, end)))
    ]


def grid_of(height: int, width: int, step: int, most: int) -> tuple[int, int]:
    """Rows and columns of crops that a picture of height x width is fitted into.

    The fewest crops that need no shrinking, or else those that need the least; sizes are without
    what the crops at the borders have more than `step`. In single precision, as the authors count.
    """
    counts = range(1, most + 1)
    grids = sorted(
        ((rows, columns) for rows in counts for columns in counts if rows * columns <= most),
        key=lambda grid: (grid[0] * grid[1], grid[0]),
    )
    sizes = np.array(grids, dtype=np.float32) * np.float32(step)
    with np.errstate(divide="ignore"):
        scales = (sizes / np.array((height, width), dtype=np.float32)).min(axis=1)
    if (scales < 1).all():
        return grids[int(scales.argmax())]
    return grids[int(np.where(scales < 1, np.float32(10e9), scales).argmin())]


def fitted(
    values: Tensor, shape: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """A picture (3, h, w) of values from 0 to 1 in the middle of zeros of `shape`, normalised; and
    a mask of where it lies. Sizes are found in single precision, as the authors find them.

    Raises InputError where nothing of the shorter side is left.
    """
    sides = torch.tensor(values.shape[1:], dtype=torch.float32)
    scale = (torch.tensor(shape, dtype=torch.float32) / sides).min()
    down, across = (sides * scale).int().tolist()
    if min(down, across) < 1:
        raise InputError(
            f"A picture of {values.shape[2]}x{values.shape[1]} is too narrow",
            why="nothing of it is left when its longer side fits",
            remedy="Cut it into parts",
            param="image",
        )
    if (down, across) != tuple(values.shape[1:]):
        values = F.interpolate(values[None], (down, across), mode="bilinear", antialias=True)[0]
    top, left = (shape[0] - down) // 2, (shape[1] - across) // 2
    around = (left, shape[1] - across - left, top, shape[0] - down - top)
    centre, spread = (torch.tensor(of_colour)[:, None, None] for of_colour in (mean, std))
    padded = F.pad(values.clamp(0, 1), around)
    return (padded - centre) / spread, F.pad(torch.ones(down, across), around)


def crop_patches(
    picture: Tensor, grid: tuple[int, int], side: int, step: int, patch: int
) -> Tensor:
    """picture (channels, height, width) to patches of its crops, channels last as the weights are:
    (crops, patches, patch * patch * channels).
    """
    crops = overlapping.cut(picture, grid, side, step)
    patches = pixels.patchify(crops, patch).unflatten(1, (-1, patch * patch))
    return patches.transpose(1, 2).flatten(1).unflatten(0, (len(crops), -1))


def picture_features(
    towers: nn.ModuleDict, features: Tensor, grid: tuple[int, int], margins: tuple[int, ...]
) -> Tensor:
    """What stands for a picture: features of the whole and of its crops (crops, patches, dim),
    pooled two by two and projected, row by row, the crops' as one picture's: (tokens, hidden).

    A window at the end of an odd row or column has zeros for the patches that it lacks.
    """
    count, side = len(features), math.isqrt(features.shape[1])
    odd, half = side % 2, (side + 1) // 2
    squares = F.pad(features.unflatten(1, (side, side)), (0, 0, 0, odd, 0, odd))
    windows = squares.unflatten(1, (half, 2)).unflatten(3, (half, 2)).transpose(2, 3)
    pooled = towers["projector"](towers["pooling"](windows.flatten(3, 4).flatten(0, 2)))
    pooled = pooled.unflatten(0, (count, half, half))
    left, right = (margin // 2 for margin in margins)
    large = overlapping.stitched(pooled[1:], grid, (left, right))
    return torch.cat((pooled[0].flatten(0, 1), large.flatten(0, 1)))


def rows_of(text: str, columns: int, rows: int, end: str) -> str:
    """The text of a grid of patches, each row with its end."""
    return (text * columns + end) * rows


def layers_named(chosen: Sequence[int], count: int) -> tuple[int, ...]:
    """Numbers of layers, some counted from the end, all from the start."""
    return tuple(layer % count for layer in chosen)


def left_out(first: int, count: int, prefix: str) -> str:
    """A pattern of the names of layers first .. count - 1, which no feature needs."""
    numbers = "|".join(map(str, range(first, count))) or "none"
    return rf"{prefix}resblocks\.({numbers})\."


def tensor_of(image: object) -> Tensor:
    """A picture's levels, float32 (3, height, width)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1).float()
