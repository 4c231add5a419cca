"""Pixtral (arXiv:2410.07073): pictures of any size, 2D rope in the tower, a break after a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from opsin.errors import MediaError
from opsin.families import bundled_template
from opsin.families.base import Encoded, MediaInput
from opsin.families.llama_shape import ACTIVATIONS, rope_parameters
from opsin.families.llava import Llava
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.vit import (
    VisionLayout,
    VisionTransformer,
    ViTConfig,
    axial_angles,
    grid_coordinates,
    vision_of,
)

TOWER = r"^(towers\.vision\.layers\.\d+)"


class Pixtral(Llava):
    """LLaVA's projector over a tower that takes the picture's own proportions."""

    message_format = "list_with_image_type_text"
    default_tower: ClassVar[str] = "pixtral"
    default_template = bundled_template("mistral_small_tool_call")
    placeholders = {"image": "[IMG]"}
    rename = (
        (r"^(model\.)?vision_tower\.patch_conv\.", "towers.vision.patch."),
        (r"^(model\.)?vision_tower\.ln_pre\.", "towers.vision.pre_norm."),
        (r"^(model\.)?vision_tower\.transformer\.layers\.", "towers.vision.layers."),
        (TOWER + r"\.attention\.q_proj\.weight$", r"\1.attention.qkv.weight[0]"),
        (TOWER + r"\.attention\.k_proj\.weight$", r"\1.attention.qkv.weight[1]"),
        (TOWER + r"\.attention\.v_proj\.weight$", r"\1.attention.qkv.weight[2]"),
        (TOWER + r"\.attention\.o_proj\.", r"\1.attention.out."),
        (TOWER + r"\.ffn_norm\.", r"\1.mlp_norm."),
        (TOWER + r"\.feed_forward\.gate_proj\.weight$", r"\1.mlp.up.weight[0]"),
        (TOWER + r"\.feed_forward\.up_proj\.weight$", r"\1.mlp.up.weight[1]"),
        (TOWER + r"\.feed_forward\.down_proj\.", r"\1.mlp.down."),
        *Llava.rename,
    )

    @property
    def merge(self) -> int:
        """Patches per side of the square that becomes one token."""
        return 1

    def vit_config(self) -> ViTConfig:
        """The vision transformer's shape, up to the last layer whose features are used."""
        vision = self.vision
        return ViTConfig(
            patch_dim=vision.get("num_channels", 3) * self.patch**2,
            hidden=vision["hidden_size"],
            layers=max(self.counts),
            heads=vision["num_attention_heads"],
            mlp_hidden=vision["intermediate_size"],
            activation=ACTIVATIONS[vision["hidden_act"]],
            norm="rms",
            norm_eps=1e-5,
            gated_mlp=True,
            patch_bias=False,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            pre_norm=True,
        )

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit = self.vit_config()
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "projector": self.projector(kernels, vit.hidden * len(self.counts)),
            }
        )

    # Pictures.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        del options
        config, unit = self.processor_config, self.patch * self.merge
        edge = (config.get("size") or {}).get("longest_edge", 1024)
        width, height = bounded_size(image.width, image.height, edge, unit)
        resized = pixels.resize(image, width, height, config.get("resample", 3))
        values = pixels.normalised(resized, *pixels.normalisation(config))
        rows, columns = height // unit, width // unit
        row = self.media_token("image") * columns
        return MediaInput(
            kind="image",
            features={"pixel_values": values},
            text="[IMG_BREAK]".join([row] * rows) + "[IMG_END]",
            num_tokens=rows * columns,
            size=image.size,
            processed_size=(width, height),
        )

    # Towers.

    def features(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> Tensor:
        """The tower's features (patches, width) of several pictures, merge blocks together."""
        tower = vision_of(towers)
        pictures = [item.features["pixel_values"].to(tower.patch.weight) for item in items]
        cut = [pixels.patchify(picture, self.patch, self.merge) for picture in pictures]
        coordinates = [
            grid_coordinates(
                picture.shape[1] // self.patch, picture.shape[2] // self.patch, self.merge
            )
            for picture in pictures
        ]
        angles = axial_angles(
            torch.cat(coordinates).to(tower.patch.weight.device),
            tower.config.hidden // tower.config.heads,
            rope_parameters(self.vision)["rope_theta"],
            staggered=True,
        )
        layout = VisionLayout([len(part) for part in cut], angles=angles)
        taps = tuple(count - 1 for count in self.counts)
        _, tapped = tower(torch.cat(cut), layout, taps)
        return torch.cat(tapped, dim=-1)

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        embeds = towers["projector"](self.features(towers, items))
        return [Encoded(part) for part in embeds.split([item.num_tokens for item in items])]


def bounded_size(width: int, height: int, edge: int, unit: int) -> tuple[int, int]:
    """The (width, height) with neither side over `edge`, then rounded up to whole units.

    Raises MediaError for a picture so narrow that nothing would be left of its shorter side.
    """
    ratio = max(width / edge, height / edge)
    if ratio > 1:
        width, height = math.floor(width / ratio), math.floor(height / ratio)
    if not width or not height:
        raise MediaError(
            "The picture is too narrow",
            why=f"at {edge} pixels for its longer side nothing is left of the shorter",
            remedy="Crop it or pad it",
            param="image",
        )
    return math.ceil(width / unit) * unit, math.ceil(height / unit) * unit


FAMILY = Pixtral
