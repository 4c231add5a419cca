"""DeepSeek-OCR (arXiv:2510.18234): SAM, then CLIP on what SAM saw; a mixture of experts writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from opsin.errors import InputError
from opsin.families.base import Encoded, MediaInput
from opsin.families.clip_shape import CLIP_RENAME
from opsin.families.deepseek_ocr_shape import CELLS, GREY, DeepseekOCRShape
from opsin.families.internvl import nearest_grid
from opsin.families.llama_shape import EXPERT_RENAME, LLAMA_RENAME
from opsin.families.options import MAX_TILES, switch_option, whole_option
from opsin.families.sam_names import SAM_RENAME
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.towers import pixels
from opsin.towers.crops import joined
from opsin.towers.feature_vit import FeatureTransformer
from opsin.towers.projectors import LearnedVector
from opsin.towers.sam import SamEncoder
from opsin.towers.vit import ViTConfig

# CLIP ViT-L/14, in the words of the authors' config.
CLIP_L = {"width": 1024, "heads": 16, "layers": 24, "image_size": 224, "patch_size": 14}
TOKEN = 64  # pixels along a token: SAM's patches of 16, halved twice
MAX_SIDE = 2048  # of a view: the attention over its patches grows with the fourth power
SQUEEZED = 640  # a view alone and no larger than this shows the picture squeezed, not padded


class DeepseekOCR(DeepseekOCRShape):
    """Tiles side by side, then the whole; each row of tokens has its end, the last a separator."""

    processor_options = ("base_size", "image_size", "cropping", "max_patches")
    no_repeat_ngram = (30, 90, CELLS)
    reductions = (512, 1024)
    rename = (
        (r"^(model\.)?sam_model\.", "towers.sam."),
        (r"^(model\.)?projector\.layers\.", "towers.projector."),
        (r"^(model\.)?image_newline$", "towers.row_end.weight"),
        (r"^(model\.)?view_sep[ae]rator$", "towers.separator.weight"),
        (r"^(model\.)?vision_model\.transformer\.", "vision_model.encoder."),
        (r"^(vision_model\..*)\.self_attn\.qkv_proj\.", r"\1.attention.qkv."),
        *SAM_RENAME,
        *CLIP_RENAME,
        *EXPERT_RENAME,
        *LLAMA_RENAME,
    )
    # CLIP's patches are SAM's features.
    ignored = (r"^(model\.)?vision_model\.embeddings\.(patch_embedding\.|position_ids$)",)

    @property
    def sam(self) -> dict[str, Any]:
        stated = self.config["vision_config"]["width"]["sam_vit_b"]
        return {**super().sam, "downsample_channels": stated.get("downsample_channels")}

    @property
    def clip(self) -> dict[str, Any]:
        """CLIP's sizes in the authors' keys."""
        return {**CLIP_L, **self.config["vision_config"]["width"].get("clip-l-14-224", {})}

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        sam, clip, hidden = self.sam_config(), self.clip, self.text_config["hidden_size"]
        vit = ViTConfig(
            patch_dim=0,
            hidden=clip["width"],
            layers=clip["layers"],
            heads=clip["heads"],
            mlp_hidden=4 * clip["width"],
            activation="quick_gelu",
            norm_eps=1e-5,
            positions=(clip["image_size"] // clip["patch_size"]) ** 2 + 1,
        )
        both = sam.reductions[-1] + vit.hidden
        return nn.ModuleDict(
            {
                "sam": SamEncoder(kernels, sam),
                "vision": FeatureTransformer(kernels, vit),
                "projector": Linear(kernels, both, hidden, bias=True),
                "row_end": LearnedVector(hidden),
                "separator": LearnedVector(hidden),
            }
        )

    # Pictures.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        base, tile = (
            side_option(options, "base_size", 1024),
            side_option(options, "image_size", 640),
        )
        most = whole_option(options, "max_patches", 9, high=MAX_TILES)
        cropping = switch_option(options, "cropping", True)
        grid = (0, 0)
        if cropping and max(image.size) > tile:
            grid = nearest_grid(*image.size, tile, 2, most)
        if grid == (1, 1):  # one tile would show what the whole does: the authors leave it out
            grid = (0, 0)
        squeezed = not cropping and base <= SQUEEZED
        square = pixels.resize(image, base, base, 3) if squeezed else padded(image, (base, base))
        across, side = tile // TOKEN, base // TOKEN
        tokens = grid[1] * across * (grid[0] * across + 1) if grid[0] else 0
        tokens += side * (side + 1) + 1
        return MediaInput(
            kind="image",
            features={
                "pixel_values": self.normalised(square),
                "pixel_values_local": self.tiles(image, grid, tile),
            },
            text=self.media_token("image") * tokens,
            num_tokens=tokens,
            size=image.size,
            processed_size=(base, base),
            details={"grid": grid},
        )

    # Towers.

    def read(self, towers: nn.ModuleDict, views: Tensor) -> Tensor:
        """Equal views (views, 3, side, side) to tokens (views, rows, columns, hidden)."""
        projector = towers["projector"]
        map_ = towers["sam"](views.to(projector.get_parameter("weight")))
        features = map_.flatten(2).transpose(1, 2)
        tokens = projector(torch.cat((towers["vision"](features), features), dim=-1))
        return tokens.unflatten(1, map_.shape[-2:])

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        wholes = [item.features["pixel_values"] for item in items]
        tiles = [item.features["pixel_values_local"] for item in items]
        views = [*wholes, *(tile for several in tiles for tile in several)]
        sides = [view.shape[-1] for view in views]
        read = {}
        for side in set(sides):  # requests may differ in their sizes
            equal = [view for view in views if view.shape[-1] == side]
            read[side] = iter(self.read(towers, torch.stack(equal)))
        tokens = iter([next(read[side]) for side in sides])
        seen = [next(tokens) for _ in wholes]
        separator = towers["separator"].get_parameter("weight")[None]
        encoded = []
        for item, whole, several in zip(items, seen, tiles, strict=True):
            parts = [towers["row_end"](whole).flatten(0, 1), separator]
            if len(several):
                own = torch.stack([next(tokens) for _ in several])
                rows = joined(own, item.details["grid"])
                parts.insert(0, towers["row_end"](rows).flatten(0, 1))
            encoded.append(Encoded(torch.cat(parts)))
        return encoded


def side_option(options: Mapping[str, Any], name: str, default: int) -> int:
    """The side of a square view in pixels; InputError unless it makes whole tokens."""
    side = whole_option(options, name, default, low=TOKEN, high=MAX_SIDE)
    if side % TOKEN:
        raise InputError(
            f"{name} cannot be {side}",
            why=f"a token is {TOKEN} pixels wide",
            remedy=f"Give a multiple of {TOKEN}, such as 512, 640, 1024 or 1280",
            param="processor_kwargs",
        )
    return side


def padded(
    image: Image.Image, size: tuple[int, int], colour: tuple[int, ...] = GREY
) -> Image.Image:
    """The picture as large as fits into `size`, in its middle; halves go to the even pixel."""
    width, height = image.size
    if width / height > size[0] / size[1]:
        inner = (size[0], max(round(height / width * size[0]), 1))
    else:
        inner = (max(round(width / height * size[1]), 1), size[1])
    small = pixels.resize(image, *inner, 3)
    canvas = Image.new("RGB", size, colour)
    canvas.paste(small, (round((size[0] - inner[0]) * 0.5), round((size[1] - inner[1]) * 0.5)))
    return canvas


FAMILY = DeepseekOCR
