"""DeepSeek-OCR 2: queries read SAM's features in reading order; a mixture of experts writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from opsin.decoder.config import MLPConfig
from opsin.families.base import Encoded, MediaInput, features_of
from opsin.families.deepseek_ocr_shape import CELLS, GREY, DeepseekOCRShape
from opsin.families.internvl import nearest_grid
from opsin.families.llama_shape import EXPERT_RENAME, LLAMA_RENAME
from opsin.families.options import MAX_TILES, switch_option, whole_option
from opsin.families.sam_names import SAM_RENAME
from opsin.kernels import Kernels
from opsin.nn.linear import Embedding, Linear
from opsin.nn.rope import RopeConfig
from opsin.towers import pixels
from opsin.towers.projectors import LearnedVector
from opsin.towers.query_encoder import QueryEncoder, QueryEncoderConfig
from opsin.towers.sam import SamEncoder

# The query encoder, of which the published config gives only the width.
ENCODER = {
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}


class DeepseekOCR2(DeepseekOCRShape):
    """Each view of a picture, the whole and tiles of it, gives as many tokens as queries."""

    no_repeat_ngram = (20, 90, CELLS)
    reductions = (512, 896)
    processor_options = ("cropping", "crop_to_patches", "min_patches", "max_patches")
    rename = (
        (r"^(model\.)?(sam_model|vision_tower\.sam_encoder)\.", "towers.sam."),
        *SAM_RENAME,
        (r"^model\.(qwen2_model\.model\.model|vision_tower\.vision_encoder)\.", "towers.encoder."),
        (r"^model\.(qwen2_model|vision_tower)\.query_768(_resolution)?\.", "towers.tile_queries."),
        (r"^model\.(qwen2_model|vision_tower)\.query_1024(_resolution)?\.", "towers.queries."),
        (r"^model\.(projector\.layers|multi_modal_projector)\.", "towers.projector."),
        (r"^model\.view_sep[ae]rator$", "towers.separator.weight"),
        *EXPERT_RENAME,
        *LLAMA_RENAME,
    )

    @property
    def encoder(self) -> dict[str, Any]:
        """The query encoder's config in Transformers' keys."""
        vision = self.config["vision_config"]
        if "encoder_config" in vision:
            return {**ENCODER, **vision["encoder_config"]}
        return {**ENCODER, "hidden_size": vision["width"]["qwen2-0-5b"]["dim"]}

    # Towers.

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        encoder = self.encoder
        hidden, heads = encoder["hidden_size"], encoder["num_attention_heads"]
        theta = (encoder.get("rope_parameters") or encoder)["rope_theta"]
        reader = QueryEncoderConfig(
            hidden=hidden,
            layers=encoder["num_hidden_layers"],
            heads=heads,
            kv_heads=encoder["num_key_value_heads"],
            mlp=MLPConfig(encoder["intermediate_size"]),
            rope=RopeConfig(hidden // heads, float(theta)),
            norm_eps=encoder["rms_norm_eps"],
        )
        out = self.text_config["hidden_size"]
        return nn.ModuleDict(
            {
                "sam": SamEncoder(kernels, self.sam_config()),
                "encoder": QueryEncoder(kernels, reader),
                "queries": Embedding(256, hidden),
                "tile_queries": Embedding(144, hidden),
                "projector": Linear(kernels, hidden, out, bias=True),
                "separator": LearnedVector(out),
            }
        )

    def read(self, towers: nn.ModuleDict, views: Tensor) -> Tensor:
        """Equal views (views, 3, side, side) to tokens (views, queries, hidden)."""
        projector = towers["projector"]
        features = towers["sam"](views.to(projector.get_parameter("weight")))
        features = features.flatten(2).transpose(1, 2)
        name = "tile_queries" if features.shape[1] <= 144 else "queries"
        return projector(towers["encoder"](features, towers[name].get_parameter("weight")))

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        wholes = self.read(towers, torch.stack([item.features["pixel_values"] for item in items]))
        counts = [len(item.features["pixel_values_local"]) for item in items]
        tiles: Sequence[Tensor] = [wholes[:0]] * len(items)
        if any(counts):
            together = features_of(items, "pixel_values_local")
            tiles = self.read(towers, together).split(counts)
        separator = towers["separator"].get_parameter("weight")[None]
        return [
            Encoded(torch.cat((own.flatten(0, 1), whole, separator)))
            for own, whole in zip(tiles, wholes, strict=True)
        ]

    # Pictures.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        config = self.processor_config
        side, tile = int((config.get("size") or {"height": 1024})["height"]), self.tile
        stated = switch_option(options, "crop_to_patches", config.get("crop_to_patches", True))
        cropping = switch_option(options, "cropping", stated)
        resample = config.get("resample", 3)
        grid = (0, 0)
        low = whole_option(options, "min_patches", config.get("min_patches", 2), high=MAX_TILES)
        high = whole_option(options, "max_patches", config.get("max_patches", 6), high=MAX_TILES)
        if cropping and max(image.size) > tile:
            grid = nearest_grid(*image.size, tile, low, high)
        scaled = [max(round(length * side / max(image.size)), 1) for length in image.size]
        small = pixels.resize(image, scaled[0], scaled[1], resample)
        grey = tuple(config.get("background_color", GREY))
        whole = self.normalised(pixels.padded_square(small, grey))
        tiles = self.tiles(image, grid, tile)
        tokens = self.view_tokens(side) + len(tiles) * self.view_tokens(tile) + 1
        return MediaInput(
            kind="image",
            features={"pixel_values": whole, "pixel_values_local": tiles},
            text=self.media_token("image") * tokens,
            num_tokens=tokens,
            size=image.size,
            processed_size=(side, side),
        )

    @property
    def tile(self) -> int:
        """Pixels along the side of a tile."""
        return int(self.processor_config.get("tile_size", 768))

    def view_tokens(self, side: int) -> int:
        """Tokens of a square view: a sixteenth of its patches."""
        return math.ceil(side / self.sam.get("patch_size", 16) / 4) ** 2


FAMILY = DeepseekOCR2
