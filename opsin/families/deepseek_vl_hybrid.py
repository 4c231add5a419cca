"""The larger DeepSeek-VL (arXiv:2403.05525): SAM sees the picture beside SigLIP, and sharper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from opsin.families.base import Encoded, MediaInput
from opsin.families.clip_shape import one_side, tile_features
from opsin.families.deepseek_vl import DeepseekVL, mean_colour
from opsin.families.llama_shape import ACTIVATIONS
from opsin.families.sam_names import SAM_RENAME
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.projectors import PairedProjector
from opsin.towers.sam import SamConfig, SamDetail, SamEncoder
from opsin.towers.vit import vision_of


class DeepseekVLHybrid(DeepseekVL):
    """Two views of a padded square, joined patch by patch."""

    rename = (
        (r"^(model\.)?high_res_vision_model\.vision_encoder\.", "towers.sam."),
        (r"^(model\.)?high_res_vision_neck\.conv1\.", "towers.detail.neck."),
        (r"^(model\.)?high_res_vision_neck\.layer_norm1\.", "towers.detail.neck_norm."),
        (r"^(model\.)?high_res_vision_neck\.conv2\.", "towers.detail.mix."),
        (r"^(model\.)?high_res_vision_neck\.layer_norm2\.", "towers.detail.mix_norm."),
        (r"^(model\.)?high_res_vision_proj\.conv1\.", "towers.detail.reductions.0."),
        (r"^(model\.)?high_res_vision_proj\.conv2\.", "towers.detail.reductions.1."),
        (r"^(model\.)?high_res_vision_alpha$", "towers.detail.early_scale"),
        (r"^(model\.)?aligner\.high_res_vision_proj\.", "towers.projector.first."),
        (r"^(model\.)?aligner\.vision_proj\.", "towers.projector.second."),
        (r"^(model\.)?aligner\.proj\.", "towers.projector.out."),
        *SAM_RENAME,
        *DeepseekVL.rename,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.sharp: dict[str, Any] = config.get("high_res_vision_config") or {}
        self.sharp_side = one_side(self.sharp.get("image_size", 1024))
        self.sharp_colour = mean_colour(
            processor_config.get("high_res_image_mean", pixels.CLIP_MEAN)
        )

    def sam_config(self) -> SamConfig:
        """SAM's shape."""
        sam = self.sharp
        hidden, patch = sam.get("hidden_size", 768), one_side(sam.get("patch_size", 16))
        return SamConfig(
            hidden=hidden,
            layers=sam.get("num_hidden_layers", 12),
            heads=sam.get("num_attention_heads", 12),
            mlp_hidden=sam.get("mlp_dim") or int(hidden * sam.get("mlp_ratio", 4.0)),
            patch=patch,
            grid=self.sharp_side // patch,
            window=sam.get("window_size", 14),
            whole=frozenset(self.global_layers),
            neck=sam.get("output_channels", 256),
            activation=ACTIVATIONS[sam.get("hidden_act", "gelu")],
            norm_eps=sam.get("layer_norm_eps", 1e-6),
            qkv_bias=sam.get("qkv_bias", True),
        )

    @property
    def global_layers(self) -> Sequence[int]:
        """SAM's layers that see the whole picture; the first is added to the result."""
        return self.sharp.get("global_attn_indexes") or (2, 5, 8, 11)

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        sam = self.sam_config()
        towers = super().towers(kernels)
        towers["sam"] = SamEncoder(kernels, sam)
        towers["detail"] = SamDetail(kernels, sam)
        return towers

    def projector(self, kernels: Kernels) -> nn.Module:
        widths = (4 * self.sam_config().neck, self.vision["hidden_size"])
        return PairedProjector(kernels, widths, self.decoder().hidden)

    def views(self, image: Image.Image) -> dict[str, torch.Tensor]:
        config = self.processor_config
        sharp = self.padded(
            image, self.sharp_side, self.sharp_colour, config.get("high_res_resample", 3)
        )
        shades = {
            "image_mean": config.get("high_res_image_mean", pixels.CLIP_MEAN),
            "image_std": config.get("high_res_image_std", pixels.CLIP_STD),
            "do_normalize": config.get("do_normalize", True),
        }
        values = pixels.normalised(sharp, *pixels.normalisation(shades))
        return {**super().views(sharp), "high_res_pixel_values": values}

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        plain = torch.stack([item.features["pixel_values"] for item in items])
        sharp = torch.stack([item.features["high_res_pixel_values"] for item in items])
        features = tile_features(vision_of(towers), plain, self.patch)
        side, early = self.side // self.patch, min(self.global_layers)
        detail = towers["detail"](towers["sam"], sharp, early, side)
        return [Encoded(embeds) for embeds in towers["projector"](detail, features)]


FAMILY = DeepseekVLHybrid
