"""InternVL 2 to 3.5 in the layout of its authors' checkpoints."""

from __future__ import annotations

from typing import Any

from opsin.families import bundled_template
from opsin.families.internvl import LAYER, InternVL


class InternVLChat(InternVL):
    """Other config keys, weight names and placeholder; the same model."""

    placeholders = {"image": "<image>", "video": "<video>"}
    media_tokens = {"image": "<IMG_CONTEXT>", "video": "<IMG_CONTEXT>"}
    default_template = bundled_template("internvl")
    tied_default = False
    rename = (
        (r"^vision_model\.encoder\.layers\.", "towers.vision.layers."),
        (r"^vision_model\.embeddings\.class_embedding$", "towers.vision.class_token"),
        (r"^vision_model\.embeddings\.patch_embedding\.", "towers.vision.patch."),
        (r"^vision_model\.embeddings\.position_embedding$", "towers.vision.positions.weight"),
        (LAYER + r"\.ls1$", r"\1.attention_scale.weight"),
        (LAYER + r"\.ls2$", r"\1.mlp_scale.weight"),
        (LAYER + r"\.norm1\.", r"\1.attention_norm."),
        (LAYER + r"\.norm2\.", r"\1.mlp_norm."),
        (LAYER + r"\.attn\.proj\.", r"\1.attention.out."),
        (LAYER + r"\.attn\.", r"\1.attention."),
        (r"^mlp1\.0\.", "towers.projector.norm."),
        (r"^mlp1\.1\.", "towers.projector.up."),
        (r"^mlp1\.3\.", "towers.projector.down."),
        *InternVL.rename,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        vision = config["vision_config"]
        translated = {
            **config,
            "text_config": config.get("llm_config") or config["text_config"],
            "vision_feature_layer": config.get("select_layer", -1),
            "vision_config": {
                **vision,
                "attention_bias": vision.get("qkv_bias", True),
                "use_qk_norm": vision.get("qk_normalization", False),
                "image_size": config.get("force_image_size") or vision.get("image_size", 448),
            },
        }
        most = config.get("max_dynamic_patch", 12) if config.get("dynamic_image_size", True) else 1
        limits = {"min_patches": config.get("min_dynamic_patch", 1), "max_patches": most}
        super().__init__(translated, {**limits, **processor_config})

    def template_serves(self, source: str) -> bool:
        """The authors' repositories carry a template of the text model, which knows no pictures."""
        return "image" in source


FAMILY = InternVLChat
