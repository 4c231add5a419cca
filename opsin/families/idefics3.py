"""Idefics3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299): tiles with their place in the text,
patches merged by pixel shuffle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from opsin.errors import InputError
from opsin.families.backbones import BackboneFamily
from opsin.families.base import Encoded, MediaInput, features_of
from opsin.families.clip_shape import (
    CLIP_IGNORED,
    CLIP_RENAME,
    clip_config,
    one_side,
    tile_features,
    with_defaults,
)
from opsin.families.llama_shape import LLAMA_RENAME
from opsin.families.options import switch_option
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.towers import pixels
from opsin.towers.vit import (
    VisionTransformer,
    bucketed_positions,
    grid_coordinates,
    vision_of,
)

FAKE = "<fake_token_around_image>"
# No side of a picture is ever made longer than this.
MAX_SIDE = 4096


class Idefics3(BackboneFamily):
    """Square tiles row by row, then the whole picture as one more tile."""

    message_format = "list_with_image_first"
    processor_options = ("do_image_splitting", "size")
    ignored = CLIP_IGNORED
    rename = (
        *CLIP_RENAME,
        (r"^(model\.)?connector\.modality_projection\.proj\.", "towers.projector."),
        *LLAMA_RENAME,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vision = with_defaults(config["vision_config"], "idefics3_vision")
        self.scale = int(config.get("scale_factor", 2))

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit = clip_config(self.vision, post_norm=True)
        merged = vit.hidden * self.scale**2
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "projector": Linear(kernels, merged, self.decoder().hidden),
            }
        )

    # Pictures.

    @property
    def tile(self) -> int:
        """Pixels along the side of a tile."""
        stated = self.processor_config.get("max_image_size") or {}
        return int(stated.get("longest_edge", one_side(self.vision["image_size"])))

    @property
    def tile_tokens(self) -> int:
        """Tokens that a tile becomes."""
        return int((self.tile // one_side(self.vision["patch_size"]) // self.scale) ** 2)

    def longest_edge(self, options: Mapping[str, Any]) -> int:
        """The longer side of the picture before it is cut, from the request or the checkpoint."""
        size = options.get("size", self.processor_config.get("size", {"longest_edge": 1456}))
        edge = size.get("longest_edge") if isinstance(size, Mapping) else None
        if type(edge) is not int or not 0 < edge <= MAX_SIDE:
            raise InputError(
                f"size cannot be {size!r}",
                remedy=f'Give {{"longest_edge": pixels}}, at most {MAX_SIDE}',
                param="processor_kwargs",
            )
        return edge

    def tiles(self, image: Image.Image, options: Mapping[str, Any]) -> list[Image.Image]:
        """The tiles of a picture, row by row, and last the whole; only the whole if not split."""
        resample, side = self.processor_config.get("resample", 1), self.tile
        split = self.processor_config.get("do_image_splitting", True)
        resized = pixels.resize(
            image, *scaled_size(*image.size, self.longest_edge(options)), resample
        )
        if not switch_option(options, "do_image_splitting", split):
            return [pixels.resize(resized, side, side, resample)]
        whole = pixels.resize(resized, *tiled_size(*resized.size, side), resample)
        if whole.size == (side, side):
            return [whole]
        places = ((x, y) for y in range(0, whole.height, side) for x in range(0, whole.width, side))
        cut = [whole.crop((x, y, x + side, y + side)) for x, y in places]
        return [*cut, pixels.resize(whole, side, side, resample)]

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        tiles = self.tiles(image, options)
        width, height = tiled_size(*scaled_size(*image.size, self.longest_edge(options)), self.tile)
        columns = width // self.tile if len(tiles) > 1 else 0
        return MediaInput(
            kind="image",
            features={"pixel_values": pixels.levels(tiles)},
            levels=self.levels,
            text=self.layout_text(len(tiles), columns),
            num_tokens=len(tiles) * self.tile_tokens,
            size=image.size,
            processed_size=(width, height) if columns else (self.tile, self.tile),
        )

    @property
    def levels(self) -> pixels.Normalisation:
        """What makes the tower's values of a tile's levels."""
        return pixels.normalisation(self.processor_config)

    def layout_text(self, tiles: int, columns: int) -> str:
        """The text of a picture: each tile's place and tokens, a line a row, then the whole."""
        run = "<image>" * self.tile_tokens
        parts = []
        for index in range(tiles - 1):
            row, column = divmod(index, columns)
            parts.append(f"{FAKE}<row_{row + 1}_col_{column + 1}>{run}")
            if column == columns - 1:
                parts.append("\n")
        gap = "\n" if parts else ""
        return f"{''.join(parts)}{gap}{FAKE}<global-img>{run}{FAKE}"

    # Towers.

    def tile_positions(self) -> Tensor:
        """The rows of the position table that a tile's patches take, merge blocks together."""
        patch = one_side(self.vision["patch_size"])
        count, side = self.tile // patch, one_side(self.vision["image_size"]) // patch
        places = grid_coordinates(count, count, self.scale)
        return bucketed_positions(count, count, side)[places[:, 0] * count + places[:, 1]]

    def tile_embeds(self, towers: nn.ModuleDict, tiles: Tensor) -> Tensor:
        """Tiles (tiles, channels, height, width) to the embeddings of their tokens."""

        def project(features: Tensor) -> Tensor:
            merged = features.reshape(-1, features.shape[-1] * self.scale**2)
            embeds: Tensor = towers["projector"](merged)
            return embeds

        embeds = tile_features(
            vision_of(towers),
            tiles,
            one_side(self.vision["patch_size"]),
            merge=self.scale,
            positions=self.tile_positions(),
            levels=self.levels,
            then=project,
        )
        return embeds.flatten(0, 1)

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        embeds = self.tile_embeds(towers, features_of(items, "pixel_values"))
        return [Encoded(part) for part in embeds.split([item.num_tokens for item in items])]


def scaled_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """The (width, height) with the longer side at `longest` and the other made even."""
    ratio = width / height
    if width >= height:
        short = int(longest / ratio)
        return longest, max(short + short % 2, 1)
    short = int(longest * ratio)
    return max(short + short % 2, 1), longest


def tiled_size(width: int, height: int, tile: int) -> tuple[int, int]:
    """The (width, height) in whole tiles: the longer side first, the other in proportion."""
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return width, math.ceil(int(width / ratio) / tile) * tile
    height = math.ceil(height / tile) * tile
    return math.ceil(int(height * ratio) / tile) * tile, height


FAMILY = Idefics3
