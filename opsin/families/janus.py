"""Janus-Pro (arXiv:2501.17811) as Transformers lays it out: its understanding of pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from opsin.families.base import MediaInput
from opsin.families.clip_shape import CLIP_IGNORED
from opsin.families.deepseek_vl import DeepseekVL
from opsin.families.llama_shape import ACTIVATIONS
from opsin.towers.vit import ViTConfig

SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language.\n\n"
)
# What draws pictures: its tokeniser, and the layers before and behind the decoder.
DRAWING = (r"^(model\.)?(vqmodel|generation_\w+)\.", r"^gen_\w+\.")
DEFAULTS = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4.0,
}


class Janus(DeepseekVL):
    """Marks around a picture, and a tower whose config has other keys."""

    around = ("<begin_of_image>", "<end_of_image>")
    default_template = (
        (DeepseekVL.default_template or "")
        .replace("User: ", "<|User|>: ")
        .replace("Assistant:", "<|Assistant|>:")
    )
    rename = (
        (r"\.self_attn\.projection_layer\.", ".self_attn.out_proj."),
        (r"^(model\.)?aligner\.fc1\.", "towers.projector.layers.0."),
        (
            r"^(model\.)?aligner\.hidden_layers\.(\d+)\.",
            lambda match: f"towers.projector.layers.{int(match[2]) + 1}.",
        ),
        *DeepseekVL.rename,
    )
    ignored = (*CLIP_IGNORED, *DRAWING)

    def vision_config(self) -> dict[str, Any]:
        vision = {**DEFAULTS, **(self.config.get("vision_config") or {})}
        vision["intermediate_size"] = int(vision["hidden_size"] * vision["mlp_ratio"])
        return vision

    def vit_config(self) -> ViTConfig:
        return dataclasses.replace(
            super().vit_config(), qkv_bias=bool(self.vision.get("attention_bias", True))
        )

    @property
    def projector_activation(self) -> Any:
        return ACTIVATIONS[self.vision["hidden_act"]]

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """As ever, behind the system prompt where the processor's config asks for it."""
        asks = self.processor_config.get("use_default_system_prompt", False)
        return (SYSTEM if asks else "") + super().expand(text, media)


FAMILY = Janus
