"""DeepSeek-OCR 2: queries read SAM's features in reading order; a mixture of experts writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from opsin.checkpoint.weights import Rename
from opsin.decoder.config import DecoderConfig, MLPConfig, MoEConfig
from opsin.families.base import Encoded, Family, MediaInput
from opsin.families.internvl import nearest_grid
from opsin.families.llama_shape import (
    ACTIVATIONS,
    EXPERT_RENAME,
    LLAMA_RENAME,
    llama_decoder,
    with_experts,
)
from opsin.families.options import MAX_TILES, switch_option, whole_option
from opsin.kernels import Kernels
from opsin.nn.linear import Embedding, Linear
from opsin.nn.rope import RopeConfig
from opsin.towers import pixels
from opsin.towers.projectors import LearnedVector
from opsin.towers.query_encoder import QueryEncoder, QueryEncoderConfig
from opsin.towers.sam import SamConfig, SamEncoder

# SAM's weight names, the authors' and Transformers', after a prefix that becomes "towers.sam.".
SAM_RENAME: tuple[Rename, ...] = (
    (r"^towers\.sam\.blocks\.", "towers.sam.layers."),
    (r"^(towers\.sam\.layers\.\d+)\.(layer_)?norm1\.", r"\1.attention_norm."),
    (r"^(towers\.sam\.layers\.\d+)\.(layer_)?norm2\.", r"\1.mlp_norm."),
    (r"^(towers\.sam\.layers\.\d+)\.attn\.qkv\.", r"\1.attention.qkv."),
    (r"^(towers\.sam\.layers\.\d+)\.attn\.proj\.", r"\1.attention.out."),
    (r"^(towers\.sam\.layers\.\d+)\.attn\.rel_pos_h$", r"\1.attention.row_offsets"),
    (r"^(towers\.sam\.layers\.\d+)\.attn\.rel_pos_w$", r"\1.attention.column_offsets"),
    (r"^(towers\.sam\.layers\.\d+)\.mlp\.lin1\.", r"\1.up."),
    (r"^(towers\.sam\.layers\.\d+)\.mlp\.lin2\.", r"\1.down."),
    (r"^towers\.sam\.patch_embed\.proj(ection)?\.", "towers.sam.patch."),
    (r"^towers\.sam\.pos_embed$", "towers.sam.positions"),
    (r"^towers\.sam\.neck\.(0|conv1)\.", "towers.sam.neck."),
    (r"^towers\.sam\.neck\.(1|layer_norm1)\.", "towers.sam.neck_norm."),
    (r"^towers\.sam\.neck\.(2|conv2)\.", "towers.sam.mix."),
    (r"^towers\.sam\.neck\.(3|layer_norm2)\.", "towers.sam.mix_norm."),
    (r"^towers\.sam\.(net_2|proj\.conv1)\.", "towers.sam.reductions.0."),
    (r"^towers\.sam\.(net_3|proj\.conv2)\.", "towers.sam.reductions.1."),
)
# The query encoder, of which the published config gives only the width.
ENCODER = {
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}


class DeepseekOCR2(Family):
    """Each view of a picture, the whole and tiles of it, gives as many tokens as queries."""

    message_format = "image_token_newline"
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

    # Configs, as published or as Transformers has them.

    @property
    def text_config(self) -> dict[str, Any]:
        text: dict[str, Any] = self.config.get("text_config") or self.config["language_config"]
        return text

    @property
    def sam(self) -> dict[str, Any]:
        """SAM's config in Transformers' keys."""
        vision = self.config["vision_config"]
        if "sam_config" in vision:
            return dict(vision["sam_config"])
        stated = vision["width"]["sam_vit_b"]
        names = {"hidden_size": "width", "num_hidden_layers": "layers"}
        names |= {"num_attention_heads": "heads", "global_attn_indexes": "global_attn_indexes"}
        return {ours: stated[theirs] for ours, theirs in names.items() if theirs in stated}

    @property
    def encoder(self) -> dict[str, Any]:
        """The query encoder's config in Transformers' keys."""
        vision = self.config["vision_config"]
        if "encoder_config" in vision:
            return {**ENCODER, **vision["encoder_config"]}
        return {**ENCODER, "hidden_size": vision["width"]["qwen2-0-5b"]["dim"]}

    def decoder(self) -> DecoderConfig:
        text = dict(self.text_config)
        text.pop("head_dim", None)
        activation = ACTIVATIONS[text.get("hidden_act", "silu")]
        inner = text.get("moe_intermediate_size", 1407)
        moe = MoEConfig(
            experts=text.get("n_routed_experts", 64),
            top_k=text["num_experts_per_tok"],
            hidden=inner,
            activation=activation,
            precise_router=True,
            normalise=bool(text.get("norm_topk_prob", False)),
            scale=text.get("routed_scaling_factor", 1.0),
            limits=expert_limits(text),
            shared=MLPConfig(inner * text.get("n_shared_experts", 2), activation),
        )
        count = text["num_hidden_layers"]
        dense = text.get("first_k_dense_replace", 0)
        kinds = text.get("mlp_layer_types") or ["dense"] * dense + ["sparse"] * (count - dense)
        sparse = [i for i, kind in enumerate(kinds) if kind == "sparse"]
        return with_experts(llama_decoder(text, tied=self.tied()), moe, sparse)

    def tied(self) -> bool:
        """Whether the head is the embedding table."""
        return bool(self.config.get("tie_word_embeddings", False))

    # Towers.

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        sam, encoder = self.sam, self.encoder
        hidden, heads = encoder["hidden_size"], encoder["num_attention_heads"]
        width, ratio = sam.get("hidden_size", 768), sam.get("mlp_ratio", 4.0)
        patch = sam.get("patch_size", 16)
        tower = SamConfig(
            hidden=width,
            layers=sam.get("num_hidden_layers", 12),
            heads=sam.get("num_attention_heads", 12),
            mlp_hidden=int(sam.get("mlp_dim") or width * ratio),
            patch=patch,
            grid=sam.get("image_size", 1024) // patch,
            window=sam.get("window_size", 14),
            whole=frozenset(sam.get("global_attn_indexes", (2, 5, 8, 11))),
            neck=sam.get("output_channels", 256),
            reductions=tuple(sam.get("downsample_channels") or (512, 896)),
        )
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
                "sam": SamEncoder(kernels, tower),
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
            together = torch.cat([item.features["pixel_values_local"] for item in items])
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
        shades = config.get("image_mean", pixels.HALF), config.get("image_std", pixels.HALF)
        resample = config.get("resample", 3)
        grid = (0, 0)
        low = whole_option(options, "min_patches", config.get("min_patches", 2), high=MAX_TILES)
        high = whole_option(options, "max_patches", config.get("max_patches", 6), high=MAX_TILES)
        if cropping and max(image.size) > tile:
            grid = nearest_grid(*image.size, tile, low, high)
        scaled = [max(round(length * side / max(image.size)), 1) for length in image.size]
        small = pixels.resize(image, scaled[0], scaled[1], resample)
        grey = tuple(config.get("background_color", (127, 127, 127)))
        whole = pixels.normalised(pixels.padded_square(small, grey), *shades)
        tiles = torch.empty(0, 3, tile, tile)
        if grid[0]:
            columns, rows = grid
            wide = pixels.resize(image, columns * tile, rows * tile, resample)
            cut = pixels.normalised(wide, *shades).view(3, rows, tile, columns, tile)
            tiles = cut.permute(1, 3, 0, 2, 4).flatten(0, 1)
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


def expert_limits(text: Mapping[str, Any]) -> tuple[int, int] | None:
    """Groups of experts and how many of them a token may use, if that is limited."""
    if text.get("topk_method", "greedy") != "group_limited_greedy" or not text.get("n_group"):
        return None
    return int(text["n_group"]), int(text["topk_group"])


FAMILY = DeepseekOCR2
