"""Phi-4-reasoning-vision: SigLIP 2 reads a picture's own patches (arXiv:2502.14786) for Phi-4."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from opsin.errors import CheckpointError
from opsin.families.base import Encoded, MediaInput, features_of
from opsin.families.clip_shape import CLIP_RENAME, clip_config, layer_counts, one_side
from opsin.families.options import whole_option
from opsin.families.phi3_shape import PHI3_RENAME, Phi3Family
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.projectors import MLPProjector
from opsin.towers.vit import VisionLayout, VisionTransformer, smoothed_positions, vision_of

VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_patches": 256,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
TOWER = r"^(model\.)?vision_tower\.vision_tower\.vision_model\."
# The most patches a picture may be given: what the published tower was trained for, with room.
MOST_PATCHES = 1 << 16


class Phi4Siglip(Phi3Family):
    """As many tokens as patches; the tokenizer's first unused one stands for them."""

    message_format = "image_token_newline"
    media_tokens = {"image": "<|dummy_0|>"}
    processor_options = ("min_num_patches", "max_num_patches")
    rename = (
        (TOWER, "vision_tower."),
        (r"^(model\.)?mm_projector\.(0|linear_1)\.", "towers.projector.up."),
        (r"^(model\.)?mm_projector\.(2|linear_2)\.", "towers.projector.down."),
        *CLIP_RENAME,
        *PHI3_RENAME,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        vision = {**VISION_DEFAULTS, **(config.get("vision_config") or {})}
        self.patch = one_side(vision["patch_size"])
        self.table = math.isqrt(vision["num_patches"])
        self.vision = {**vision, "image_size": self.table * self.patch}
        layers = vision["num_hidden_layers"]
        self.count = layer_counts(config.get("mm_vision_select_layer") or -2, layers)[0]
        later = "|".join(str(index) for index in range(self.count, layers)) or "none"
        self.ignored = (TOWER + rf"(head\.|post_layernorm\.|encoder\.layers\.({later})\.)",)
        kind = config.get("mm_projector_type", "mlp2x_gelu")
        if kind != "mlp2x_gelu":
            raise CheckpointError(
                f"The checkpoint's projector is of type {kind!r}",
                why="this family takes mlp2x_gelu",
                remedy="Choose a checkpoint of this family with that one",
            )

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit, hidden = clip_config(self.vision, layers=self.count), self.config["hidden_size"]
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "projector": MLPProjector(kernels, vit.hidden, hidden, hidden),
            }
        )

    # What goes in.

    def extra_eos(self) -> tuple[str, ...]:
        return ("<|im_end|>",)

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        config, patch = self.config, self.patch
        low, high = (
            whole_option(options, name, config.get(name) or default, high=MOST_PATCHES)
            for name, default in (("min_num_patches", 256), ("max_num_patches", 3600))
        )
        own = max((image.width // patch) * (image.height // patch), 1)
        columns, rows = patch_grid(image.size, patch, min(max(own, low), high))
        resized = pixels.resize(image, columns * patch, rows * patch, 2)
        values = pixels.normalised(resized, pixels.HALF, pixels.HALF)
        # The colours of a pixel lie side by side, as the tower's matrix has them.
        cut = pixels.patchify(values, patch).unflatten(1, (3, patch**2)).mT.flatten(1)
        return MediaInput(
            kind="image",
            features={"pixel_values": cut},
            text=self.media_token("image") * len(cut),
            num_tokens=len(cut),
            size=image.size,
            processed_size=resized.size,
            details={"grid": (rows, columns)},
        )

    # Towers.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        tower = vision_of(towers)
        table = tower.positions.weight
        grids = [item.details["grid"] for item in items]
        counts = [rows * columns for rows, columns in grids]
        places = torch.cat([smoothed_positions(table, *grid) for grid in grids])
        cut = features_of(items, "pixel_values").to(table)
        features, _ = tower(cut, VisionLayout(counts, position_embeds=places))
        return [Encoded(part) for part in towers["projector"](features).split(counts)]


def patch_grid(size: tuple[int, int], patch: int, most: int) -> tuple[int, int]:
    """Columns and rows of patches, at most so many, for a picture of (width, height).

    The scale is halved in on to a hundred-thousandth; sides are rounded up to whole patches.
    """
    low, high = 1e-6, 100.0

    def grid(scale: float) -> tuple[int, int]:
        columns, rows = (max(math.ceil(side * scale / patch), 1) for side in size)
        return columns, rows

    while high - low >= 1e-5:
        scale = (low + high) / 2
        if math.prod(grid(scale)) <= most:
            low = scale
        else:
            high = scale
    return grid(low)


FAMILY = Phi4Siglip
