"""ERNIE 4.5 VL: experts for text and others for pictures, and a resampler behind the tower."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opsin.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    GroupedMoEConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
)
from opsin.families.base import Encoded, MediaInput
from opsin.families.llama_shape import ACTIVATIONS, EXPERT_RENAME, llama_decoder
from opsin.families.qwen2_vl import Qwen2VL
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm
from opsin.towers.projectors import MLPProjector
from opsin.towers.vit import VisionTransformer, ViTConfig, vision_of

# What the authors' own processor and template call the placeholder.
OLD_PLACEHOLDER = "<|image@placeholder|>"
MARKS = ("image_start_token_id", "image_end_token_id")
MARK_DEFAULTS = {"image_start_token_id": 101304, "image_end_token_id": 101305}


class Ernie45MoEVL(Qwen2VL):
    """The tower's layers are Qwen2-VL's; the config is flat as published, nested as Transformers
    has it.
    """

    message_format = "list_with_image_url_first"
    placeholders = {"image": "<|IMAGE_PLACEHOLDER|>"}

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        count = self.num_experts

        def placed(match: re.Match[str]) -> str:
            """The second half of the experts are those of pictures."""
            group, expert = divmod(int(match[1]), count)
            name, part = {"gate": ("gate_up", 0), "up": ("gate_up", 1), "down": ("down", 0)}[
                match[2]
            ]
            return f".mlp.groups.{group}.{name}.weight[{part},{expert}]"

        self.rename = (
            (r"\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight$", placed),
            (r"\.mlp\.gate\.weight$", ".mlp.groups.0.router.weight^T"),
            (r"\.mlp\.gate\.weight_1$", ".mlp.groups.1.router.weight^T"),
            (r"\.mlp\.moe_statics\.e_score_correction_bias$", ".mlp.selection_bias"),
            (r"^(model\.)?resampler_model\.", "towers."),
            (r"^towers\.(spatial|temporal)_linear\.(0|fc1)\.", r"towers.\1.up."),
            (r"^towers\.(spatial|temporal)_linear\.(2|fc2)\.", r"towers.\1.down."),
            (r"^towers\.(spatial|temporal)_linear\.(3|ln)\.", r"towers.\1_norm."),
            (r"^towers\.mlp\.", "towers.projector."),
            (r"^(model\.)?vision_model\.ln\.", "visual.post_norm."),
            (r"^(model\.)?vision_model\.", "visual."),
            (r"^visual\.post_norm\.", "towers.vision.post_norm."),
            *EXPERT_RENAME,
            *Qwen2VL.rename,
        )

    # Configs.

    @property
    def num_experts(self) -> int:
        """Experts of one kind; the published config counts both kinds, equal, in a list."""
        count = self.text_config.get("moe_num_experts", 64)
        return int(count if isinstance(count, int) else count[0])

    @property
    def vision(self) -> dict[str, Any]:
        vision = super().vision
        merges = {
            "spatial_merge_size": self.config.get("spatial_conv_size", 2),
            "temporal_merge_size": self.config.get("temporal_conv_size", 2),
            "temporal_patch_size": 1,
        }
        return {**merges, **vision}

    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", True))

    def sparse(self) -> list[bool]:
        """Which layers have experts."""
        text = self.text_config
        count = text["num_hidden_layers"]
        kinds = text.get("mlp_layer_types")
        if kinds is not None:
            return [kind == "sparse" for kind in kinds]
        first, last = text.get("moe_layer_start_index", 1), text.get("moe_layer_end_index", count)
        first = first if isinstance(first, int) else min(first)
        last = last if isinstance(last, int) else max(last)
        step = text.get("moe_layer_interval", 1)
        return [(i + 1) % step == 0 and first <= i <= last for i in range(count)]

    # The decoder.

    def decoder(self) -> DecoderConfig:
        text = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, **self.text_config}
        text["attention_bias"] = text["mlp_bias"] = bool(text.get("use_bias"))
        rope = text.get("rope_parameters") or {}
        # Published configs say how many frequencies turn by time; rows and columns share the rest.
        pairs = (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]) // 2
        stated = rope.get("mrope_section", (0, 0, text.get("freq_allocation", 20)))
        axes = (1, 2) * ((pairs - stated[2]) // 2) + (0,) * stated[2]
        plain = llama_decoder(text, tied=self.tied(), axes=axes)
        layers = tuple(
            self.layer(layer, sparse)
            for layer, sparse in zip(plain.layers, self.sparse(), strict=True)
        )
        return dataclasses.replace(plain, layers=layers)

    def layer(self, plain: LayerConfig, sparse: bool) -> LayerConfig:
        """A layer with neighbouring features paired in rope, and experts if it has them."""
        assert isinstance(plain.attention, AttentionConfig)
        assert plain.attention.rope is not None
        rope = dataclasses.replace(plain.attention.rope, pairs="adjacent")
        attention = dataclasses.replace(plain.attention, rope=rope)
        if not sparse:
            return dataclasses.replace(plain, attention=attention)
        text = self.text_config
        activation = ACTIVATIONS[text.get("hidden_act", "silu")]
        widths = text.get("moe_intermediate_size") or (1536, 512)
        groups = tuple(
            MoEConfig(
                experts=self.num_experts,
                top_k=text.get("moe_k", 6),
                hidden=width,
                activation=activation,
                precise_router=True,
                min_total=text.get("moe_norm_min", 1e-12),
            )
            for width in widths
        )
        shared = text.get("moe_num_shared_experts") or 0
        block = MLPConfig(widths[0] * shared, activation, bool(text.get("use_bias")))
        mlp = GroupedMoEConfig(groups, block if shared else None, selection_bias=True)
        return dataclasses.replace(plain, attention=attention, mlp=mlp)

    def expert_groups(self, token_ids: Sequence[int]) -> Tensor | None:
        """A picture's tokens and the marks around it go to the second group."""
        marks = [self.config.get(name, MARK_DEFAULTS[name]) for name in MARKS]
        patch = self.config.get("image_token_id", self.config.get("im_patch_id", 100295))
        groups = torch.isin(torch.tensor(token_ids), torch.tensor([patch, *marks])).long()
        return groups if groups.any() else None

    # The tower.

    def vit_config(self) -> ViTConfig:
        vision = self.vision
        hidden = vision["hidden_size"]
        return ViTConfig(
            patch_dim=self.patch_dim(),
            hidden=hidden,
            layers=vision["depth"],
            heads=vision["num_heads"],
            mlp_hidden=int(vision.get("intermediate_size") or hidden * vision["mlp_ratio"]),
            activation=ACTIVATIONS[vision.get("hidden_act", "quick_gelu")],
            norm_eps=vision.get("rms_norm_eps", 1e-6),
            patch_bias=False,
            post_norm=True,
        )

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit, text = self.vit_config(), self.text_config
        wide = vit.hidden * self.merge**2
        longer = wide * self.vision["temporal_merge_size"]
        out = text["hidden_size"]
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "spatial": MLPProjector(kernels, wide, wide, wide),
                "spatial_norm": norm(kernels, "layer", wide, vit.norm_eps),
                "temporal": MLPProjector(kernels, longer, wide, wide),
                "temporal_norm": norm(kernels, "layer", wide, vit.norm_eps),
                "projector": Linear(kernels, wide, out, bias=True),
                "after_norm": norm(kernels, "rms", out, text.get("rms_norm_eps", 1e-5)),
            }
        )

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        layout = self.layout(vision_of(towers), items)
        features, _ = towers["vision"](self.patches(towers, items), layout)
        x = towers["spatial_norm"](towers["spatial"](features))
        x = torch.cat((x, x), dim=-1)  # a picture is both frames of a pair
        x = towers["temporal_norm"](towers["temporal"](x))
        merged = towers["after_norm"](towers["projector"](x))
        return [Encoded(part) for part in merged.split([item.num_tokens for item in items])]

    # Pictures.

    def pixel_limits(self, options: Mapping[str, Any]) -> tuple[int, int]:
        config = self.processor_config
        stated = config.get("size") or config.get("max_pixels")
        low, high = super().pixel_limits(options)
        return low, high if stated or "max_pixels" in options else 28 * 28 * 6177

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        return super().expand(text.replace(OLD_PLACEHOLDER, self.placeholders["image"]), media)


FAMILY = Ernie45MoEVL
