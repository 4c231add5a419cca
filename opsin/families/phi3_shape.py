"""The decoder of Phi-3 (arXiv:2404.14219), as models that also read pictures have it."""

from __future__ import annotations

from opsin.checkpoint.weights import Rename
from opsin.decoder.config import DecoderConfig
from opsin.families.backbones import backbone
from opsin.families.base import Family
from opsin.families.llama_shape import LLAMA_RENAME

PHI3_RENAME: tuple[Rename, ...] = (
    (r"\.self_attn\.qkv_proj\.", ".attention.qkv."),
    (r"\.mlp\.gate_up_proj\.", ".mlp.gate_up."),
    *LLAMA_RENAME,
)


class Phi3Family(Family):
    """One config for all parts; the text around pictures is read piece by piece."""

    text_apart = True

    def decoder(self) -> DecoderConfig:
        text = {**self.text_config, "model_type": "phi3"}
        if not (text.get("rope_parameters") or text.get("rope_scaling")):
            text["rope_parameters"] = {
                "rope_theta": text.get("rope_theta", 10000.0),
                "partial_rotary_factor": text.get("partial_rotary_factor", 1.0),
            }
        if (text.get("sliding_window") or 0) >= text["max_position_embeddings"]:
            text["sliding_window"] = None
        return backbone(text, tied=bool(text.get("tie_word_embeddings", False)))
