"""Phi-3-vision and Phi-3.5-vision (arXiv:2404.14219): numbered pictures, crops and whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.checkpoint.safetensors import StoredTensor
from opsin.errors import InputError, MediaError
from opsin.families.base import Encoded, MediaInput, features_of
from opsin.families.clip_shape import (
    CLIP_RENAME,
    clip_config,
    layer_counts,
    one_side,
    tile_features,
)
from opsin.families.options import MAX_TILES, whole_option
from opsin.families.phi3_shape import PHI3_RENAME, Phi3Family
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.crops import joined
from opsin.towers.projectors import LearnedVector, MLPProjector
from opsin.towers.vit import VisionTransformer, vision_of

# CLIP ViT-L/14 at 336, which the authors' code builds whatever the config says.
CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
VISION = r"^model\.vision_embed_tokens\."
SHARED_TABLE = "model.vision_embed_tokens.wte.weight"
WHITE = (255, 255, 255)


class Phi3Vision(Phi3Family):
    """Rows of patches, two by two, of all crops together, each with its end; then the whole."""

    message_format = "numbered_image_tokens"
    placeholders = {"image": "<|image_1|>"}
    media_tokens = {"image": "<|image|>"}
    processor_options = ("num_crops",)
    rename = (
        (VISION + r"img_processor\.", "vision_tower."),
        (VISION + r"img_projection\.0\.", "towers.projector.up."),
        (VISION + r"img_projection\.2\.", "towers.projector.down."),
        (VISION + r"sub_GN$", "towers.row_end.weight"),
        (VISION + r"glb_GN$", "towers.between.weight"),
        (VISION + r"wte\.", "model.embed_tokens."),
        *CLIP_RENAME,
        *PHI3_RENAME,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vision = {**CLIP_L, **(config.get("vision_config") or {})}
        layers = self.vision["num_hidden_layers"]
        stated = config.get("img_processor") or {}
        self.count = layer_counts(stated.get("layer_idx", -2), layers)[0]
        later = "|".join(str(index) for index in range(self.count, layers)) or "none"
        unused = rf"(post_layernorm\.|encoder\.layers\.({later})\.|embeddings\.position_ids$)"
        self.ignored = (VISION + r"img_processor\.vision_model\." + unused,)
        self.side = one_side(self.vision["image_size"])
        self.half = self.side // one_side(self.vision["patch_size"]) // 2

    def inspect(self, tensors: Sequence[StoredTensor]) -> None:
        """The embedding table is stored under one name or the other, or under both."""
        names = {tensor.name for tensor in tensors}
        if {SHARED_TABLE, "model.embed_tokens.weight"} <= names:
            self.ignored += (re.escape(SHARED_TABLE),)

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit, hidden = clip_config(self.vision, layers=self.count), self.config["hidden_size"]
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "row_end": LearnedVector(4 * vit.hidden),
                "between": LearnedVector(4 * vit.hidden),
                "projector": MLPProjector(kernels, 4 * vit.hidden, hidden, hidden),
            }
        )

    # What goes in.

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """Placeholders bear their pictures' numbers, which count from one."""
        numbers = re.findall(r"<\|image_(\d+)\|>", text)
        if numbers != [str(i + 1) for i in range(len(numbers))]:
            raise InputError(
                "The prompt's pictures are not numbered in order",
                why=f"it names them {', '.join(numbers[:20])}",
                remedy="Number them <|image_1|>, <|image_2|> and so on",
                param="prompt",
            )
        return super().expand(re.sub(r"<\|image_\d+\|>", "<|image_1|>", text), media)

    def extra_eos(self) -> tuple[str, ...]:
        return ("<|end|>",)

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        config, side, half = self.processor_config, self.side, self.half
        most = whole_option(options, "num_crops", config.get("num_crops", 1), high=MAX_TILES)
        padded = _padded(image, most, side)
        columns, rows = padded.width // side, padded.height // side
        values = pixels.normalised(padded, *pixels.normalisation(config))
        whole = F.interpolate(values[None], (side, side), mode="bicubic", align_corners=False)
        crops = values.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
        tokens = (columns * rows + 1) * half**2 + 1 + (rows + 1) * half
        return MediaInput(
            kind="image",
            features={"pixel_values": torch.cat((whole, crops))},
            text=self.media_token("image") * tokens,
            num_tokens=tokens,
            size=image.size,
            processed_size=padded.size,
            details={"grid": (columns, rows)},
        )

    # Towers.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        patch = one_side(self.vision["patch_size"])
        crops = features_of(items, "pixel_values")
        features = tile_features(vision_of(towers), crops, patch, counts=(self.count,))[:, 1:]
        counts = [len(item.features["pixel_values"]) for item in items]
        return [
            Encoded(towers["projector"](self.picture(towers, part, item.details["grid"])))
            for item, part in zip(items, features.split(counts), strict=True)
        ]

    def picture(self, towers: nn.ModuleDict, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Crops of a picture (crops, patches, width), the whole first, to (tokens, 4 * width)."""
        blocks = features.unflatten(1, (self.half, 2, self.half, 2)).transpose(2, 3)
        cells = blocks.flatten(3)  # (crops, half, half, 4 width)
        parts = (joined(cells[1:], grid), cells[0])
        detail, whole = (towers["row_end"](part).flatten(0, 1) for part in parts)
        between = towers["between"].get_parameter("weight")[None]
        order = (self.config.get("embd_layer") or {}).get("hd_transform_order", "sub_glb")
        both = (whole, between, detail) if order == "glb_sub" else (detail, between, whole)
        return torch.cat(both)


def _padded(image: Image.Image, most: int, side: int) -> Image.Image:
    """The picture as wide as so many crops allow, white above and below up to whole crops.

    An upright picture is laid on its side for it and set up again.
    """
    upright = image.width < image.height
    if upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    columns = 1
    while (columns + 1) * math.ceil((columns + 1) / ratio) <= most:
        columns += 1
    width = columns * side
    height = int(width / ratio)
    if height < 1:
        raise MediaError(
            f"The picture is too narrow ({image.width}x{image.height})",
            why="made as long as this model's crops it would have no height",
            remedy="Crop it or pad it",
            param="image",
        )
    filled = math.ceil(height / side) * side
    padded = Image.new("RGB", (width, filled), WHITE)
    padded.paste(pixels.resize(image, width, height, 2), (0, (filled - height) // 2))
    return padded.transpose(Image.Transpose.TRANSPOSE) if upright else padded


FAMILY = Phi3Vision
