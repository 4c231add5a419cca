"""Llama 3.2 Vision (arXiv:2407.21783, section 7): some layers read the picture, the text does not
hold it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from opsin.decoder.config import CrossAttentionConfig, DecoderConfig, LayerConfig
from opsin.families.base import Encoded, Family, MediaInput, SourceViews
from opsin.families.clip_shape import one_side
from opsin.families.llama_shape import ACTIVATIONS, LLAMA_RENAME, llama_decoder
from opsin.families.options import whole_option
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.towers import pixels
from opsin.towers.canvas import best_canvas, size_on_canvas
from opsin.towers.tiled_vit import TiledConfig, TiledTransformer
from opsin.towers.vit import ViTConfig

DEFAULT_CROSS = (3, 8, 13, 18, 23, 28, 33, 38)
DEFAULT_TAPS = (3, 7, 15, 23, 30)


class Mllama(Family):
    """A tower over up to four tiles at once, and gated cross-attention layers in the decoder."""

    message_format = "list_with_image"
    placeholders = {"image": "<|image|>"}
    processor_options = ("max_image_tiles",)
    rename = (
        (r"^(model\.)?vision_model\.", "towers.vision."),
        (r"^(model\.)?multi_modal_projector\.", "towers.projector."),
        (r"^towers\.vision\.class_embedding$", "towers.vision.class_token"),
        (r"^towers\.vision\.patch_embedding\.", "towers.vision.patch."),
        (r"^towers\.vision\.layernorm_pre\.", "towers.vision.pre_norm."),
        (r"^towers\.vision\.layernorm_post\.", "towers.vision.post_norm."),
        (r"\.gated_positional_embedding\.gate$", ".gates[0]"),
        (r"\.gated_positional_embedding\.embedding$", ".positions"),
        (r"\.gated_positional_embedding\.tile_embedding\.", ".tile_positions."),
        (r"\.pre_tile_positional_embedding\.gate$", ".gates[1]"),
        (r"\.pre_tile_positional_embedding\.embedding\.", ".before."),
        (r"\.post_tile_positional_embedding\.gate$", ".gates[2]"),
        (r"\.post_tile_positional_embedding\.embedding\.", ".after."),
        (r"^towers\.vision\.transformer\.layers\.", "towers.vision.layers."),
        (r"^towers\.vision\.global_transformer\.layers\.", "towers.vision.global_layers."),
        (r"\.gate_attn$", ".gates[0]"),
        (r"\.gate_ffn$", ".gates[1]"),
        (r"^(towers\..*)\.mlp\.fc1\.", r"\1.mlp.up."),
        (r"^(towers\..*)\.mlp\.fc2\.", r"\1.mlp.down."),
        (r"\.cross_attn_attn_gate$", ".attention_gate"),
        (r"\.cross_attn_mlp_gate$", ".mlp_gate"),
        (r"\.cross_attn\.q_proj\.", ".attention.query."),
        (r"\.cross_attn\.k_proj\.weight$", ".attention.source.weight[0]"),
        (r"\.cross_attn\.v_proj\.weight$", ".attention.source.weight[1]"),
        (r"\.cross_attn\.o_proj\.", ".attention.out."),
        (r"\.cross_attn\.([qk])_norm\.", r".attention.\1_norm."),
        *LLAMA_RENAME,
        (r"^(towers\..*)\.input_layernorm\.", r"\1.attention_norm."),
    )

    def decoder(self) -> DecoderConfig:
        text = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, **self.text_config}
        plain = llama_decoder(text, tied=False)
        heads = text["num_attention_heads"]
        cross = CrossAttentionConfig(
            heads=heads,
            kv_heads=text.get("num_key_value_heads", 8),
            head_dim=text["hidden_size"] // heads,
            qk_norm="rms",
        )
        chosen = text.get("cross_attention_layers") or DEFAULT_CROSS
        layers = tuple(
            LayerConfig(cross if i in chosen else layer.attention, layer.mlp)
            for i, layer in enumerate(plain.layers)
        )
        # The embedding table has eight rows more than the head, of which one is the picture's.
        return dataclasses.replace(plain, layers=layers, extra_embeddings=8)

    # The tower.

    @property
    def vision(self) -> dict[str, Any]:
        """The tower's config."""
        vision: dict[str, Any] = self.config["vision_config"]
        return vision

    @property
    def tiles(self) -> int:
        """Tiles that every picture is padded to."""
        return int(self.vision.get("max_num_tiles", 4))

    @property
    def tile_tokens(self) -> int:
        """Features of one tile, the class token's included."""
        across = one_side(self.vision["image_size"]) // one_side(self.vision["patch_size"])
        return across**2 + 1

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vision = self.vision
        tower = TiledConfig(
            vit=ViTConfig(
                patch_dim=3 * one_side(vision["patch_size"]) ** 2,
                hidden=vision["hidden_size"],
                layers=vision["num_hidden_layers"],
                heads=vision.get("attention_heads", 16),
                mlp_hidden=vision["intermediate_size"],
                activation=ACTIVATIONS[vision.get("hidden_act", "gelu")],
                norm_eps=vision.get("norm_eps", 1e-5),
                positions=self.tile_tokens,
            ),
            global_layers=vision.get("num_global_layers", 8),
            tiles=self.tiles,
            tilings=len(vision.get("supported_aspect_ratios") or tilings(4)) + 1,
            taps=tuple(vision.get("intermediate_layers_indices") or DEFAULT_TAPS),
        )
        width = vision.get("vision_output_dim", 7680)
        out = self.text_config["hidden_size"]
        projector = Linear(kernels, width, out, bias=True)
        return nn.ModuleDict({"vision": TiledTransformer(kernels, tower), "projector": projector})

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        tower, projector = towers["vision"], towers["projector"]
        weight = projector.get_parameter("weight")
        patch = one_side(self.vision["patch_size"])
        encoded = []
        for item in items:
            tiles = item.features["pixel_values"].to(weight)
            patches = torch.stack([pixels.patchify(tile, patch) for tile in tiles])
            spare = patches.new_zeros(self.tiles - len(tiles), *patches.shape[1:])
            tiling = item.features["tiling"].to(weight.device)
            features = tower(torch.cat((patches, spare)), tiling, len(tiles))
            encoded.append(Encoded(None, source=projector(features)))
        return encoded

    # Pictures.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        config = self.processor_config
        side = int(config["size"]["height"])
        stated = config.get("max_image_tiles", 4)
        most = whole_option(options, "max_image_tiles", stated, high=self.tiles)
        supported = tilings(most)
        rows, columns = best_canvas(image.size, side, supported)
        canvas = Image.new("RGB", (columns * side, rows * side))
        size = size_on_canvas(image.size, canvas.size, side)
        canvas.paste(pixels.resize(image, *size, config.get("resample", 2)))
        values = pixels.normalised(canvas, *pixels.normalisation(config))
        tiles = values.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
        return MediaInput(
            kind="image",
            features={
                "pixel_values": tiles,
                "tiling": torch.tensor([supported.index((rows, columns)) + 1]),
            },
            text=self.placeholders["image"],
            num_tokens=1,
            size=image.size,
            processed_size=canvas.size,
            source_tokens=self.tiles * self.tile_tokens,
        )

    def source_views(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> SourceViews | None:
        """A picture is seen from its place up to the next; neighbours are seen together."""
        if not media:
            return None
        starts = [int(item.indices[0]) for item in media]
        ends = [*starts[1:], len(token_ids)]
        for i in reversed(range(len(media) - 1)):
            if ends[i] == starts[i] + 1:
                ends[i] = ends[i + 1]
        seen = torch.zeros(len(token_ids), len(media), dtype=torch.bool)
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            seen[start:end, i] = True
        kinds, view_of = seen.unique(dim=0, return_inverse=True)
        rows = torch.zeros(len(media), self.tiles, self.tile_tokens, dtype=torch.bool)
        for i, item in enumerate(media):
            rows[i, : len(item.features["pixel_values"])] = True
        views = (kinds[:, :, None] & rows.flatten(1)).flatten(1)
        return SourceViews(views, view_of.where(kinds[view_of].any(dim=1), -1))


def tilings(most: int) -> list[tuple[int, int]]:
    """Every (rows, columns) of at most `most` tiles, in the order of the tower's tables."""
    pairs = ((rows, columns) for rows in range(1, most + 1) for columns in range(1, most + 1))
    return [pair for pair in pairs if pair[0] * pair[1] <= most]


FAMILY = Mllama
