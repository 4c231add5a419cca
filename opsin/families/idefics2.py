"""Idefics2 (arXiv:2405.02246): pictures in their own proportions, resampled to a fixed number of
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from opsin.errors import MediaError
from opsin.families.backbones import DEFAULTS, BackboneFamily
from opsin.families.base import Encoded, MediaInput
from opsin.families.clip_shape import (
    CLIP_IGNORED,
    CLIP_RENAME,
    clip_config,
    one_side,
    with_defaults,
)
from opsin.families.llama_shape import ACTIVATIONS, LLAMA_RENAME
from opsin.families.options import switch_option
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.projectors import GatedProjector
from opsin.towers.resamplers import PerceiverConfig, PerceiverResampler
from opsin.towers.vit import VisionLayout, VisionTransformer, bucketed_positions, vision_of

FAKE = "<fake_token_around_image>"
PROJECTION = r"^(model\.)?connector\.modality_projection\."
ATTENTION = r"^(towers\.resampler\.layers\.\d+)\.self_attn\."


class Idefics2(BackboneFamily):
    """The picture whole, or its four quarters and then the whole."""

    message_format = "list_with_image"
    processor_options = ("do_image_splitting",)
    ignored = CLIP_IGNORED
    rename = (
        *CLIP_RENAME,
        (PROJECTION + r"gate_proj\.weight$", "towers.projector.gate_up.weight[0]"),
        (PROJECTION + r"up_proj\.weight$", "towers.projector.gate_up.weight[1]"),
        (PROJECTION + r"down_proj\.", "towers.projector.down."),
        (r"^(model\.)?connector\.perceiver_resampler\.", "towers.resampler."),
        (r"^(towers\.resampler\.layers\.\d+)\.input_latents_norm\.", r"\1.latents_norm."),
        (r"^(towers\.resampler\.layers\.\d+)\.input_context_norm\.", r"\1.context_norm."),
        (ATTENTION + r"q_proj\.", r"\1.attention.query."),
        (ATTENTION + r"k_proj\.weight$", r"\1.attention.key_value.weight[0]"),
        (ATTENTION + r"v_proj\.weight$", r"\1.attention.key_value.weight[1]"),
        *LLAMA_RENAME,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vision = with_defaults(config.get("vision_config") or {}, "idefics2_vision")
        self.patch = one_side(self.vision["patch_size"])

    def perceiver(self) -> PerceiverConfig:
        """The resampler's shape; a config that forgot the decoder's width means that width."""
        stated, decoder = self.config.get("perceiver_config") or {}, self.decoder()
        hidden, eps = stated.get("hidden_size", 4096), stated.get("rms_norm_eps", 1e-6)
        if hidden != decoder.hidden:
            hidden, eps = decoder.hidden, decoder.norm_eps
        return PerceiverConfig(
            hidden=hidden,
            latents=stated.get("resampler_n_latents", 64),
            layers=stated.get("resampler_depth", 3),
            heads=stated.get("resampler_n_heads", 16),
            kv_heads=stated.get("num_key_value_heads", 4),
            head_dim=stated.get("resampler_head_dim", 96),
            mlp_hidden=4 * hidden,
            activation=ACTIVATIONS[stated.get("hidden_act", "silu")],
            norm_eps=eps,
        )

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit = clip_config(self.vision, post_norm=True)
        text = {**DEFAULTS["mistral"], **self.text_config}
        projector = GatedProjector(
            kernels,
            vit.hidden,
            text["intermediate_size"],
            text["hidden_size"],
            ACTIVATIONS[text.get("hidden_act", "silu")],
        )
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "projector": projector,
                "resampler": PerceiverResampler(kernels, self.perceiver()),
            }
        )

    # Pictures.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        config = self.processor_config
        size = config.get("size") or {}
        edges = size.get("shortest_edge", 378), size.get("longest_edge", 980)
        split = switch_option(options, "do_image_splitting", config.get("do_image_splitting"))
        parts = [*quarters(image), image] if split else [image]
        resized = [
            pixels.resize(part, *bounded_size(*part.size, *edges), config.get("resample", 2))
            for part in parts
        ]
        normalisation = pixels.normalisation(config)
        values = [pixels.normalised(part, *normalisation) for part in resized]
        widest, tallest = (max(part.size[i] for part in resized) for i in (0, 1))
        padded = [
            F.pad(value, (0, widest - value.shape[2], 0, tallest - value.shape[1]))
            for value in values
        ]
        latents = self.perceiver().latents
        one = f"{FAKE}{self.media_token('image') * latents}"
        return MediaInput(
            kind="image",
            features={
                "pixel_values": torch.stack(padded),
                "sizes": torch.tensor([value.shape[1:] for value in values]),
            },
            text=one * len(parts) + FAKE,
            num_tokens=latents * len(parts),
            size=image.size,
            processed_size=resized[-1].size,
        )

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """Neighbouring pictures share the token between them; a word after one gets a space."""
        joined = super().expand(text, media).replace(FAKE + FAKE, FAKE)
        return re.sub(rf"{FAKE}(?=[^\s<])", f"{FAKE} ", joined)

    # Towers.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        tower = vision_of(towers)
        side = one_side(self.vision["image_size"]) // self.patch
        cut, positions = [], []
        for item in items:
            for value, (height, width) in zip(
                item.features["pixel_values"], item.features["sizes"].tolist(), strict=True
            ):
                rows, columns = height // self.patch, width // self.patch
                kept = value[:, : rows * self.patch, : columns * self.patch]
                cut.append(pixels.patchify(kept.to(tower.patch.weight), self.patch))
                positions.append(bucketed_positions(rows, columns, side))
        lengths = [len(part) for part in cut]
        table = tower.positions.weight
        embeds = table[torch.cat(positions).to(table.device)]
        features, _ = tower(torch.cat(cut), VisionLayout(lengths, position_embeds=embeds))
        resampled = towers["resampler"](towers["projector"](features), lengths).flatten(0, 1)
        return [Encoded(part) for part in resampled.split([item.num_tokens for item in items])]


def quarters(image: Image.Image) -> list[Image.Image]:
    """The four quarters of a picture, row by row.

    Raises MediaError if it is only one pixel wide or high.
    """
    width, height = image.size
    x, y = width // 2, height // 2
    if not x or not y:
        raise MediaError(
            f"The picture is too small to be split ({width}x{height})",
            remedy="Send a larger one, or do_image_splitting=false",
            param="image",
        )
    boxes = ((0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height))
    return [image.crop(box) for box in boxes]


def bounded_size(width: int, height: int, shortest: int, longest: int) -> tuple[int, int]:
    """The (width, height) scaled to `longest` if over it, then each side at least `shortest`."""
    ratio = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / ratio)
    elif height > width and height > longest:
        width, height = int(longest * ratio), longest
    return max(width, shortest), max(height, shortest)


FAMILY = Idefics2
