"""Molmo (arXiv:2409.17146): overlapping crops, pooled by attention, added to their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from opsin.checkpoint.safetensors import StoredTensor
from opsin.decoder.config import AttentionConfig, DecoderConfig, LayerConfig, MLPConfig
from opsin.families.base import Encoded, Family, MediaInput
from opsin.families.molmo_shape import (
    BLOCK_RENAME,
    TOWER_RENAME,
    crop_patches,
    fitted,
    grid_of,
    halves,
    layers_named,
    left_out,
    picture_features,
    rows_of,
    tensor_of,
)
from opsin.families.options import MAX_TILES, whole_option
from opsin.kernels import Kernels
from opsin.nn.linear import Embedding
from opsin.nn.rope import RopeConfig
from opsin.towers import pixels
from opsin.towers.projectors import GatedProjector
from opsin.towers.vit import VisionLayout, VisionTransformer, ViTConfig, vision_of
from opsin.towers.window_pooling import WindowPooling
from opsin.types import Grounding, Task

IMAGE = "<|image|>"
START, END, PATCH, COLUMN = "<im_start>", "<im_end>", "<im_patch>", "<im_col>"
# The tokenizers have no beginning token: the end stands in.
BEGIN = "<|endoftext|>"
# The tower that the authors' code builds, whatever the config says.
CLIP: dict[str, Any] = {
    "image_patch_size": 14,
    "image_emb_dim": 1024,
    "image_num_heads": 16,
    "image_num_layers": 23,
    "image_mlp_dim": 4096,
    "image_num_pos": 577,
    "image_norm_eps": 1e-5,
}
PROCESSOR: dict[str, Any] = {
    "base_image_input_size": (336, 336),
    "image_patch_size": 14,
    "image_mean": pixels.CLIP_MEAN,
    "image_std": pixels.CLIP_STD,
    "max_crops": 12,
    "overlap_margins": (4, 4),
}


class Molmo(Family):
    """One picture at most; points are written as `<point x="10.5" y="20">`."""

    message_format = "prompt_only"
    one_picture = True
    placeholders = {"image": IMAGE}
    media_tokens = {"image": PATCH}
    bare_prompt = True
    tokenizer_frame = False
    processor_options = ("max_crops",)
    grounding = (Grounding("point_tags", 100),)
    tasks = {
        "point": Task("Point to {text}.", "a point on each TEXT"),
        "caption": Task("Describe this image.", "a description"),
    }

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vision = CLIP | dict(config.get("vision_config") or {})
        self.settings = PROCESSOR | processor_config
        self.rows = config.get("embedding_size") or self.require(config, "vocab_size")
        self.tied = bool(config.get("weight_tying", False))
        count = self.vision["image_num_layers"]
        self.taps = layers_named(config.get("vit_layers", (-2, -9)), count)
        self.side = self.settings["base_image_input_size"][0]
        norm = "post_norm" if config.get("norm_after") else "norm"
        tower = r"^(model\.vision_backbone|vision_tower)\."
        self.ignored = (
            r"rotary_emb\.inv_freq$",
            left_out(max(self.taps) + 1, count, tower + r"image_vit\.transformer\."),
        )
        self.rename = (
            (r"^(model\.transformer|language_model\.model)\.", "decoder."),
            (tower + r"image_vit\.", "towers.vision."),
            (tower + r"image_pooling_2d\.", "towers.pooling."),
            (tower + r"image_projector\.", "towers.projector."),
            (tower + r"pad_embed$", "towers.padding.weight"),
            (r"^(decoder\.blocks\.\d+)\.attn_norm\.", rf"\1.attention_{norm}."),
            (r"^(decoder\.blocks\.\d+)\.ff_norm\.", rf"\1.mlp_{norm}."),
            (r"^(decoder\.blocks\.\d+)\.([qk]_norm)\.", r"\1.attention.\2."),
            *BLOCK_RENAME,
            *TOWER_RENAME,
        )

    def apart(self, tensor: StoredTensor) -> Sequence[StoredTensor]:
        return halves(tensor)

    def decoder(self) -> DecoderConfig:
        config = self.config
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        whole, after = bool(config.get("attention_layer_norm")), bool(config.get("norm_after"))
        attention = AttentionConfig(
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=hidden // heads,
            rope=RopeConfig(hidden // heads, float(config.get("rope_theta", 10000.0))),
            qkv_bias=bool(config.get("qkv_bias", False)),
            qk_norm="rms" if whole else None,
            qk_norm_whole=whole,
        )
        mlp = MLPConfig(config["intermediate_size"] // 2)
        layer = LayerConfig(attention, mlp, post_norms=after, pre_norms=not after)
        return DecoderConfig(
            vocab_size=self.rows,
            hidden=hidden,
            layers=(layer,) * config["num_hidden_layers"],
            max_positions=config.get("max_position_embeddings", 4096),
            norm_eps=config.get("layer_norm_eps", 1e-5),
            tied_head=self.tied,
            extra_embeddings=config.get("additional_vocab_size", 128),
        )

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vision, wide = self.vision, self.vision["image_emb_dim"]
        both, hidden = wide * len(self.taps), self.config["hidden_size"]
        tower = ViTConfig(
            patch_dim=3 * vision["image_patch_size"] ** 2,
            hidden=wide,
            layers=max(self.taps) + 1,
            heads=vision["image_num_heads"],
            mlp_hidden=vision["image_mlp_dim"],
            activation="quick_gelu",
            norm_eps=vision["image_norm_eps"],
            patch_bias=False,
            positions=vision["image_num_pos"],
            class_token=True,
            pre_norm=True,
        )
        inner = self.config["intermediate_size"] // 2
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, tower),
                "padding": Embedding(2, both),
                "pooling": WindowPooling(kernels, both, wide, vision["image_num_heads"], out=True),
                "projector": GatedProjector(kernels, wide, inner, hidden),
            }
        )

    # What goes in.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        """The whole picture, and larger in crops; which patches are padding, for the crops."""
        settings, side, patch = self.settings, self.side, self.settings["image_patch_size"]
        margins = tuple(settings["overlap_margins"])
        most = whole_option(options, "max_crops", settings["max_crops"], high=MAX_TILES)
        step = side - sum(margins) * patch
        border = side - step
        values = tensor_of(image) / 255
        grid = grid_of(image.height - border, image.width - border, step, most)
        norm = settings["image_mean"], settings["image_std"]
        whole, _ = fitted(values, (side, side), *norm)
        shape = grid[0] * step + border, grid[1] * step + border
        large, shown = fitted(values, shape, *norm)
        crops = crop_patches(large, grid, side, step, patch)
        cover = crop_patches(shown[None], grid, side, step, patch).mean(-1)
        # The authors tell each crop of the next one's padding, the whole of the first one's.
        cover = torch.cat((cover, torch.full_like(cover[:1], -1)))
        rows, columns = (count * step // patch + sum(margins) for count in grid)
        base = side // patch // 2
        shapes = ((base, base), ((rows + 1) // 2, (columns + 1) // 2))
        grids = [rows_of(PATCH, across, down, COLUMN) for down, across in shapes]
        return MediaInput(
            kind="image",
            features={
                "pixel_values": torch.cat((crop_patches(whole, (1, 1), side, side, patch), crops)),
                "cover": cover,
            },
            text="".join(f"{START}{text}{END}" for text in grids),
            num_tokens=sum(down * across for down, across in shapes),
            size=image.size,
            processed_size=shape[::-1],
            details={"grid": grid},
        )

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """The beginning, the picture, then a user's turn."""
        words = text.replace(IMAGE, "") if media else text
        return BEGIN + "".join(item.text for item in media) + f" User: {words} Assistant:"

    # What the towers do.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        return [self._encoded(towers, item) for item in items]

    def _encoded(self, towers: nn.ModuleDict, item: MediaInput) -> Encoded:
        tower, padding = vision_of(towers), towers["padding"].get_parameter("weight")
        crops = item.features["pixel_values"].to(padding)
        count, length = crops.shape[:2]
        places = tower.positions.weight.repeat(count, 1)
        layout = VisionLayout([length] * count, position_embeds=places)
        _, tapped = tower(crops.flatten(0, 1), layout, self.taps)
        x = torch.cat(tapped, dim=-1).unflatten(0, (count, -1))[:, 1:]
        cover = item.features["cover"].to(padding.device)[..., None]
        partly = (cover < 1) & (cover != 0)
        x = x + padding[0] * (cover == 0).to(x) + padding[1] * partly.to(x)
        margins = tuple(self.settings["overlap_margins"])
        return Encoded(picture_features(towers, x, item.details["grid"], margins), adds=True)


FAMILY = Molmo
