"""Gemma 3 (arXiv:2503.19786): SigLIP pooled to a fixed number of tokens that see each other both
ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import nn

from opsin.decoder.config import DecoderConfig
from opsin.errors import InputError
from opsin.families.backbones import BackboneFamily
from opsin.families.base import Encoded, MediaInput, features_of
from opsin.families.clip_shape import (
    CLIP_IGNORED,
    CLIP_RENAME,
    clip_config,
    one_side,
    tile_features,
    with_defaults,
)
from opsin.families.gemma_shape import GEMMA_RENAME, gemma_decoder
from opsin.families.options import switch_option
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import RMSNorm
from opsin.towers import pixels
from opsin.towers.vit import VisionTransformer, grid_coordinates, vision_of

PAN_AND_SCAN: Mapping[str, Any] = {
    "do_pan_and_scan": False,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
MAX_CROPS = 64


class Gemma3(BackboneFamily):
    """One square view of each picture, and crops of a long one if asked for."""

    message_format = "start_image_token"
    placeholders = {"image": "<start_of_image>"}
    media_tokens = {"image": "<image_soft_token>"}
    processor_options = tuple(PAN_AND_SCAN)
    tied_default = True
    ignored = CLIP_IGNORED
    rename = (
        *CLIP_RENAME,
        (r"^(model\.)?multi_modal_projector\.mm_soft_emb_norm\.", "towers.norm."),
        (
            r"^(model\.)?multi_modal_projector\.mm_input_projection_weight$",
            "towers.projector.weight^T",
        ),
        *GEMMA_RENAME,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vision = with_defaults(config.get("vision_config") or {}, "siglip_vision_model")
        self.patch = one_side(self.vision["patch_size"])
        self.side = one_side(self.vision["image_size"]) // self.patch
        self.tile_tokens = int(config.get("mm_tokens_per_image", 256))

    def decoder(self) -> DecoderConfig:
        # A config may state a cap for the logits, which the model with a tower never applies.
        text = {**self.text_config, "final_logit_softcapping": None}
        return gemma_decoder(text, tied=self.tied())

    @property
    def pool(self) -> int:
        """Patches along the side of the square whose mean becomes one token."""
        return self.side // int(self.tile_tokens**0.5)

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit = clip_config(self.vision, post_norm=True)
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "norm": RMSNorm(kernels, vit.hidden, vit.norm_eps, unit_offset=True),
                "projector": Linear(kernels, vit.hidden, self.decoder().hidden),
            }
        )

    # Pictures.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        stated = {name: self.processor_config.get(name) for name in PAN_AND_SCAN}
        chosen = {**PAN_AND_SCAN, **{k: v for k, v in stated.items() if v is not None}, **options}
        cut = crops(image, chosen)
        views = [image, *(cut if switch_option(chosen, "do_pan_and_scan", False) else [])]
        size, resample = self.processor_config["size"], self.processor_config.get("resample", 2)
        normalisation = pixels.normalisation(self.processor_config)
        resized = [pixels.resize(view, size["width"], size["height"], resample) for view in views]
        soft = self.media_token("image") * self.tile_tokens
        one = f"\n\n{self.placeholders['image']}{soft}<end_of_image>\n\n"
        text = one
        if len(views) > 1:
            others = " ".join([one] * (len(views) - 1))
            text = (
                f"Here is the original image {one} "
                f"and here are some crops to help you see better {others}"
            )
        return MediaInput(
            kind="image",
            features={"pixel_values": pixels.normalised_tiles(resized, *normalisation)},
            text=text,
            num_tokens=len(views) * self.tile_tokens,
            size=image.size,
            processed_size=(size["width"], size["height"]),
        )

    def atomic_spans(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> list[tuple[int, int]]:
        """Each view of a picture is one run."""
        del token_ids
        runs = [run for item in media for run in item.indices.split(self.tile_tokens)]
        return [(int(run[0]), int(run[-1]) + 1) for run in runs]

    # Towers.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        places = grid_coordinates(self.side, self.side, self.pool)
        features = tile_features(
            vision_of(towers),
            features_of(items, "pixel_values"),
            self.patch,
            merge=self.pool,
            positions=places[:, 0] * self.side + places[:, 1],
        )
        pooled = features.flatten(0, 1).unflatten(0, (-1, self.pool**2)).mean(dim=1)
        embeds = towers["projector"](towers["norm"](pooled))
        return [Encoded(part) for part in embeds.split([item.num_tokens for item in items])]


def crops(image: Image.Image, options: Mapping[str, Any]) -> list[Image.Image]:
    """Equal crops along the longer side of a picture that is long enough; else none."""
    smallest, most, ratio = (_positive(options, name) for name in tuple(PAN_AND_SCAN)[1:])
    longer, shorter = max(image.size), min(image.size)
    if longer / shorter < ratio:
        return []
    count = min(longer // int(smallest), math.floor(longer / shorter + 0.5))
    count = min(int(most), max(2, count))
    step = math.ceil(longer / count)
    if min(step, shorter) < smallest:
        return []
    wide = image.width >= image.height
    starts = (step * i for i in range(count))
    if wide:
        return [image.crop((x, 0, min(x + step, longer), shorter)) for x in starts]
    return [image.crop((0, y, shorter, min(y + step, longer))) for y in starts]


def _positive(options: Mapping[str, Any], name: str) -> float:
    value = options[name]
    whole = name != "pan_and_scan_min_ratio_to_activate"
    right = type(value) is int or (type(value) is float and not whole)
    if not right or not 0 < value <= (MAX_CROPS if "num_crops" in name else 1 << 20):
        raise InputError(
            f"{name} cannot be {value!r}",
            remedy="Give a positive number" + (", whole" if whole else ""),
            param="processor_kwargs",
        )
    return float(value)


FAMILY = Gemma3
