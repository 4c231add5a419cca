"""InternVL 2 to 3.5 in the layout of its authors' checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opsin.checkpoint.cut import cut
from opsin.checkpoint.safetensors import StoredTensor
from opsin.families import bundled_template
from opsin.families.internvl import LAYER, InternVL

TEXT = r"^language_model\.(model\.layers\.\d+)"
# Where the authors' own conversation is not ChatML, its template by their name for it.
TEMPLATES = {"phi3-chat": "internvl_phi3"}


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
        # InternLM 2, whose queries, keys and values `apart` has cut out of one matrix.
        (r"^language_model\.model\.tok_embeddings\.", "decoder.embedding."),
        (r"^language_model\.output\.", "decoder.head."),
        (TEXT + r"\.attention\.wq\.(\w+)$", r"\1.attention.qkv.\2[0]"),
        (TEXT + r"\.attention\.wk\.(\w+)$", r"\1.attention.qkv.\2[1]"),
        (TEXT + r"\.attention\.wv\.(\w+)$", r"\1.attention.qkv.\2[2]"),
        (TEXT + r"\.attention\.wo\.", r"\1.attention.out."),
        (TEXT + r"\.ffn_norm\.", r"\1.mlp_norm."),
        (TEXT + r"\.feed_forward\.w1\.(\w+)$", r"\1.mlp.gate_up.\2[0]"),
        (TEXT + r"\.feed_forward\.w3\.(\w+)$", r"\1.mlp.gate_up.\2[1]"),
        (TEXT + r"\.feed_forward\.w2\.", r"\1.mlp.down."),
        # Phi-3, whose fused matrices are ours.
        (TEXT + r"\.self_attn\.qkv_proj\.", r"\1.attention.qkv."),
        (TEXT + r"\.mlp\.gate_up_proj\.", r"\1.mlp.gate_up."),
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
        if config.get("template") in TEMPLATES:
            self.default_template = bundled_template(TEMPLATES[config["template"]])

    def extra_eos(self) -> tuple[str, ...]:
        return ("<|im_end|>", "<|end|>")

    def apart(self, tensor: StoredTensor) -> Sequence[StoredTensor]:
        """InternLM 2 keeps, for each group of heads, its queries, its key and its value."""
        if not tensor.name.endswith(".attention.wqkv.weight"):
            return (tensor,)
        text = self.text_config
        heads = text["num_attention_heads"]
        groups = text.get("num_key_value_heads") or heads
        dim = tensor.shape[0] // (heads + 2 * groups)
        together = heads // groups * dim  # rows of a group's queries
        parts = {"wq": (0, together), "wk": (together, dim), "wv": (together + dim, dim)}
        found = []
        for name, (first, rows) in parts.items():
            starts = range(first, tensor.shape[0], together + 2 * dim)
            runs = tuple((start, start + rows) for start in starts)
            part = cut(tensor, rows=runs)
            found.append(replace(part, name=tensor.name.replace("wqkv", name)))
        return found

    def template_serves(self, source: str) -> bool:
        """The authors' repositories carry a template of the text model, which knows no pictures."""
        return "image" in source


FAMILY = InternVLChat
