"""LLaVA 1.6 (LLaVA-NeXT): the whole picture, then tiles of it at the best-fitting resolution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from opsin.families.base import Encoded, MediaInput
from opsin.families.llava import Llava
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.projectors import LearnedVector

PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


class LlavaNext(Llava):
    """Adds tiles, whose features lie in rows that end with a learned vector, the margin cut off."""

    rename = ((r"^(model\.)?image_newline$", "towers.newline.weight"), *Llava.rename)

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        towers = super().towers(kernels)
        towers["newline"] = LearnedVector(self.decoder().hidden)
        return towers

    @property
    def tile(self) -> int:
        """Pixels along the side of a tile."""
        config = self.processor_config
        crop, size = config.get("crop_size"), config["size"]
        for stated in (crop, size):
            if isinstance(stated, int):
                return stated
            if stated and "height" in stated:
                return int(stated["height"])
        return int(size["shortest_edge"])

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        del options
        config, side = self.processor_config, self.tile
        resample = config.get("resample", 3)
        size = best_resolution(*image.size, config.get("image_grid_pinpoints", PINPOINTS))
        canvas = fitted(image, size, resample)
        places = ((x, y) for y in range(0, size[1], side) for x in range(0, size[0], side))
        tiles = [canvas.crop((x, y, x + side, y + side)) for x, y in places]
        tiles.insert(0, pixels.resize(image, side, side, resample))
        normalisation = pixels.normalisation(config)
        values = pixels.normalised_tiles(tiles, *normalisation)
        across = side // self.patch
        columns, rows = size[0] // side * across, size[1] // side * across
        left, top = margins(*image.size, columns, rows)
        kept_rows, kept_columns = rows - 2 * top, columns - 2 * left
        tokens = self.tile_tokens(side, side) + kept_rows * (kept_columns + 1)
        return MediaInput(
            kind="image",
            features={
                "pixel_values": values,
                "grid": torch.tensor([size[1] // side, size[0] // side]),
                "margins": torch.tensor([top, left]),
            },
            text=self.media_token("image") * tokens,
            num_tokens=tokens,
            size=image.size,
            processed_size=size,
        )

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        tiles = [item.features["pixel_values"] for item in items]
        projected = self.project(towers, torch.cat(tiles)).split([len(part) for part in tiles])
        across = self.tile // self.patch
        encoded = []
        for item, (base, *parts) in zip(items, projected, strict=True):
            grid_rows, grid_columns = item.features["grid"].tolist()
            top, left = item.features["margins"].tolist()
            rows, columns = grid_rows * across, grid_columns * across
            picture = torch.stack(parts).view(grid_rows, grid_columns, across, across, -1)
            picture = picture.transpose(1, 2).reshape(rows, columns, -1)
            kept = picture[top : rows - top, left : columns - left]
            embeds = torch.cat((base, towers["newline"](kept).flatten(0, 1)))
            encoded.append(Encoded(embeds * self.media_scale))
        return encoded


def best_resolution(
    width: int, height: int, candidates: Sequence[Sequence[int]]
) -> tuple[int, int]:
    """The (width, height), out of (height, width) candidates, that keeps most of the picture.

    Of equals it is the one with the least margin, then the first.
    """

    def worth(candidate: Sequence[int]) -> tuple[int, int]:
        tall, wide = candidate
        scale = min(wide / width, tall / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - wide * tall

    tall, wide = max(candidates, key=worth)
    return wide, tall


def fitted(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
    """The picture, its proportions kept, in the middle of a black canvas of `size`."""
    across, down = size[0] / image.width, size[1] / image.height
    if across < down:
        scaled = (size[0], min(math.ceil(image.height * across), size[1]))
    else:
        scaled = (min(math.ceil(image.width * down), size[0]), size[1])
    canvas = Image.new("RGB", size)
    place = ((size[0] - scaled[0]) // 2, (size[1] - scaled[1]) // 2)
    canvas.paste(pixels.resize(image, *scaled, resample), place)
    return canvas


def margins(width: int, height: int, columns: int, rows: int) -> tuple[int, int]:
    """How many columns on either side and rows above and below hold none of the picture."""
    if width / height > columns / rows:
        return 0, (rows - int(round(height * (columns / width), 7))) // 2
    return (columns - int(round(width * (rows / height), 7))) // 2, 0


FAMILY = LlavaNext
