"""LLaVA 1.5 (arXiv:2310.03744): one square picture, an inner layer of CLIP, an MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from opsin.families import bundled_template
from opsin.families.backbones import BackboneFamily
from opsin.families.base import Encoded, MediaInput, features_of
from opsin.families.clip_shape import (
    CLIP_IGNORED,
    CLIP_RENAME,
    POST_NORM,
    clip_config,
    later_layers,
    layer_counts,
    one_side,
    tile_features,
    with_defaults,
)
from opsin.families.llama_shape import ACTIVATIONS, LLAMA_RENAME
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.projectors import MLPProjector
from opsin.towers.vit import VisionTransformer, vision_of


class Llava(BackboneFamily):
    """CLIP or SigLIP, an MLP, and any of the usual decoders."""

    message_format = "list_with_image"
    default_tower: ClassVar[str] = "clip_vision_model"
    default_template = bundled_template("vicuna")
    rename = (
        *CLIP_RENAME,
        (r"^(model\.)?multi_modal_projector\.linear_1\.", "towers.projector.up."),
        (r"^(model\.)?multi_modal_projector\.linear_2\.", "towers.projector.down."),
        *LLAMA_RENAME,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vision = with_defaults(config.get("vision_config") or {}, self.default_tower)
        self.patch = one_side(self.vision["patch_size"])
        self.counts = layer_counts(
            config.get("vision_feature_layer", -2), self.vision["num_hidden_layers"]
        )
        later = later_layers(max(self.counts), self.vision["num_hidden_layers"])
        self.ignored = (*CLIP_IGNORED, POST_NORM, *later)

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit = clip_config(self.vision, layers=max(self.counts))
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "projector": self.projector(kernels, vit.hidden * len(self.counts)),
            }
        )

    def projector(self, kernels: Kernels, in_features: int) -> MLPProjector:
        """From the tower's features to the decoder's width."""
        hidden = self.decoder().hidden
        return MLPProjector(
            kernels,
            in_features,
            hidden,
            hidden,
            activation=ACTIVATIONS[self.config.get("projector_hidden_act", "gelu")],
            bias=self.config.get("multimodal_projector_bias", True),
        )

    def crops_first(self) -> bool:
        """Whether the first feature of each tile, CLIP's class token, is left out."""
        return bool(self.config.get("vision_feature_select_strategy", "default") == "default")

    def tile_tokens(self, width: int, height: int) -> int:
        """How many features a picture of this size gives."""
        patch = self.patch
        class_token = self.vision["model_type"] == "clip_vision_model"
        return (width // patch) * (height // patch) + class_token - self.crops_first()

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        del options
        framed = pixels.framed(image, self.processor_config)
        tokens = self.tile_tokens(*framed.size)
        values = pixels.normalised(framed, *pixels.normalisation(self.processor_config))
        return MediaInput(
            kind="image",
            features={"pixel_values": values[None]},
            text=self.media_token("image") * tokens,
            num_tokens=tokens,
            size=image.size,
            processed_size=framed.size,
        )

    def project(self, towers: nn.ModuleDict, tiles: Tensor) -> Tensor:
        """Tiles (tiles, channels, height, width) to embeddings (tiles, tokens, hidden)."""
        features = tile_features(vision_of(towers), tiles, self.patch, counts=self.counts)
        kept = features[:, 1:] if self.crops_first() else features
        projected: Tensor = towers["projector"](kept.flatten(0, 1))
        return projected.unflatten(0, kept.shape[:2])

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        tiles = features_of(items, "pixel_values")
        return [Encoded(embeds * self.media_scale) for embeds in self.project(towers, tiles)]


FAMILY = Llava
