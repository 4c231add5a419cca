"""DeepSeek-VL (arXiv:2403.05525), the smaller one: a padded square, all of SigLIP, a deep MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from opsin.families import bundled_template
from opsin.families.backbones import BackboneFamily
from opsin.families.base import Encoded, MediaInput
from opsin.families.clip_shape import (
    CLIP_IGNORED,
    CLIP_RENAME,
    clip_config,
    one_side,
    tile_features,
    with_defaults,
)
from opsin.families.llama_shape import LLAMA_RENAME
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.projectors import DeepProjector
from opsin.towers.vit import VisionTransformer, ViTConfig, vision_of


class DeepseekVL(BackboneFamily):
    """A picture is as many tokens as its square has patches, between the texts of `around`."""

    message_format = "list_with_image_first"
    placeholders = {"image": "<image_placeholder>"}
    default_template = bundled_template("deepseek_vl")
    tied_default = True
    around: tuple[str, str] = ("", "")
    rename = (
        *CLIP_RENAME,
        (r"^(model\.)?aligner\.linear1\.", "towers.projector.layers.0."),
        (r"^(model\.)?aligner\.linear2\.", "towers.projector.layers.1."),
        *LLAMA_RENAME,
    )
    ignored: tuple[str, ...] = CLIP_IGNORED

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vision = self.vision_config()
        self.side = one_side(self.vision["image_size"])
        self.patch = one_side(self.vision["patch_size"])
        self.colour = mean_colour(processor_config.get("image_mean", pixels.CLIP_MEAN))

    def vision_config(self) -> dict[str, Any]:
        """The tower's config with what it leaves out."""
        return with_defaults(self.config.get("vision_config") or {}, "siglip_vision_model")

    def vit_config(self) -> ViTConfig:
        """The vision transformer's shape."""
        return clip_config(self.vision, post_norm=True)

    def projector(self, kernels: Kernels) -> nn.Module:
        """From the tower's features to the decoder's width."""
        width, hidden = self.vision["hidden_size"], self.decoder().hidden
        depth = self.vision.get("depth", 2)
        return DeepProjector(kernels, width, hidden, depth, self.projector_activation)

    @property
    def projector_activation(self) -> Any:
        """The activation between the projector's layers."""
        return "gelu"

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vision = VisionTransformer(kernels, self.vit_config())
        return nn.ModuleDict({"vision": vision, "projector": self.projector(kernels)})

    # Pictures.

    def views(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """The towers' inputs, (3, height, width) each."""
        resample = self.processor_config.get("resample", 3)
        square = self.padded(image, self.side, self.colour, resample)
        shades = pixels.normalisation(self.processor_config)
        return {"pixel_values": pixels.normalised(square, *shades)}

    def padded(
        self, image: Image.Image, side: int, colour: tuple[int, ...], resample: int
    ) -> Image.Image:
        """The picture with its longer side `side` pixels, in the middle of a square."""
        scale, least = side / max(image.size), self.processor_config.get("min_size", 14)
        width, height = (max(round(length * scale), least) for length in image.size)
        return pixels.padded_square(pixels.resize(image, width, height, resample), colour)

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        del options
        tokens = (self.side // self.patch) ** 2
        start, end = self.around
        return MediaInput(
            kind="image",
            features=self.views(image),
            text=f"{start}{self.media_token('image') * tokens}{end}",
            num_tokens=tokens,
            size=image.size,
            processed_size=(self.side, self.side),
        )

    # Towers.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        tiles = torch.stack([item.features["pixel_values"] for item in items])
        features = tile_features(vision_of(towers), tiles, self.patch)
        return [Encoded(embeds) for embeds in towers["projector"](features)]


def mean_colour(mean: Sequence[float] | None) -> tuple[int, ...]:
    """What fills up a square: the mean of the pictures, or grey."""
    return (127, 127, 127) if mean is None else tuple(int(value * 255) for value in mean)


FAMILY = DeepseekVL
