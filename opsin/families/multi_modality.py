"""Janus and the smaller DeepSeek-VL as their authors publish them: one config for both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from opsin.checkpoint.weights import Rename
from opsin.families.deepseek_vl import DeepseekVL
from opsin.families.janus import DRAWING, Janus
from opsin.families.llama_shape import LLAMA_RENAME

# SigLIP's weights as timm names them, behind a prefix that becomes "towers.vision.".
TIMM_RENAME: tuple[Rename, ...] = (
    (r"^towers\.vision\.pos_embed$", "towers.vision.positions.weight"),
    (r"^towers\.vision\.patch_embed\.proj\.", "towers.vision.patch."),
    (r"^towers\.vision\.norm\.", "towers.vision.post_norm."),
    (r"^towers\.vision\.blocks\.(\d+)\.norm1\.", r"towers.vision.layers.\1.attention_norm."),
    (r"^towers\.vision\.blocks\.(\d+)\.norm2\.", r"towers.vision.layers.\1.mlp_norm."),
    (r"^towers\.vision\.blocks\.(\d+)\.attn\.qkv\.", r"towers.vision.layers.\1.attention.qkv."),
    (r"^towers\.vision\.blocks\.(\d+)\.attn\.proj\.", r"towers.vision.layers.\1.attention.out."),
    (r"^towers\.vision\.blocks\.(\d+)\.mlp\.fc1\.", r"towers.vision.layers.\1.mlp.up."),
    (r"^towers\.vision\.blocks\.(\d+)\.mlp\.fc2\.", r"towers.vision.layers.\1.mlp.down."),
)
# The head that pools a picture into one vector, which no decoder sees.
POOLING = r"^vision_model\..*\battn_pool\."
# "siglip_large_patch16_384", the one tower that these models were published with.
SIGLIP_LARGE = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 16,
    "hidden_act": "gelu",
}


def activation_index(match: re.Match[str]) -> str:
    """A projector's layer, counted without the activations between."""
    return f"towers.projector.layers.{int(match[1]) // 2}."


class MultiModality(DeepseekVL):
    """The same as Transformers' layout but for names; marks around a picture where it can draw."""

    rename = (
        (r"^vision_model\.vision_tower\.", "towers.vision."),
        (r"^aligner\.layers\.(\d+)\.", activation_index),
        *TIMM_RENAME,
        *LLAMA_RENAME,
    )
    ignored = (POOLING, *DRAWING)

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        if "gen_vision_config" in config:
            self.around = Janus.around
            self.default_template = Janus.default_template

    @property
    def text_config(self) -> dict[str, Any]:
        return {"model_type": "llama", **self.require(self.config, "language_config")}

    def vision_config(self) -> dict[str, Any]:
        vision = self.require(self.config, "vision_config")
        stated = {**vision, **vision.get("params", {})}
        depth = (self.config.get("aligner_config") or {}).get("params", {}).get("depth", 2)
        return {
            **tower_shape(stated),
            "image_size": stated.get("image_size", 384),
            "depth": depth,
        }


def tower_shape(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The larger SigLIP's shape, with what a config states of it in timm's words or ours."""
    names = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
    names |= {"patch_size": "patch_size"}
    shape: dict[str, Any] = {"num_channels": 3, "layer_norm_eps": 1e-6, **SIGLIP_LARGE}
    shape |= {ours: stated[ours] for ours in names if ours in stated}
    shape |= {ours: stated[theirs] for ours, theirs in names.items() if theirs in stated}
    inner = int(shape["hidden_size"] * stated.get("mlp_ratio", 4.0))
    shape["intermediate_size"] = stated.get("intermediate_size", inner)
    return shape


FAMILY = MultiModality
