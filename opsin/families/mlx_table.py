"""What mlx-vlm calls the weights of each family that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from opsin.families.mlx_names import MLXNames

# The text model alone in `language_model`, as Transformers saves it and as most are published.
TEXT = (
    ("language_model.", "language_model."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
PROJECTOR = (
    ("multi_modal_projector.", "multi_modal_projector."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
QWEN = MLXNames(
    (
        ("visual.", "vision_tower."),
        ("model.visual.", "vision_tower."),
        *TEXT[1:],
        ("model.", "language_model.model."),
    )
)
QWEN_LINEAR = MLXNames(
    (("mtp.", None), *QWEN.prefixes),
    offset=r"\.(input_layernorm|post_attention_layernorm|[qk]_norm|model\.norm)\.weight$",
    moved=r"\.linear_attn\.conv1d\.weight$",
)
IDEFICS = MLXNames(
    (
        ("model.vision_model.", "vision_model."),
        ("model.text_model.", "language_model."),
        ("model.connector.", "connector."),
        ("lm_head.", "language_model.lm_head."),
    ),
    head="language_model.lm_head.weight",
)
CLIP = (
    ("vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
)
LLAVA = MLXNames(
    (
        *CLIP,
        *PROJECTOR,
        *TEXT,
        ("image_newline", "image_newline"),
        ("model.image_newline", "image_newline"),
    )
)
GEMMA3 = replace(LLAVA, head="language_model.lm_head.weight")
PIXTRAL = MLXNames(
    (
        ("vision_tower.", "vision_tower.vision_model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        *PROJECTOR,
        *TEXT,
    )
)
MLLAMA = MLXNames(
    (
        ("vision_model.", "vision_tower."),
        ("model.vision_model.", "vision_tower."),
        *PROJECTOR,
        *TEXT,
    )
)
GEMMA4 = MLXNames(
    (
        ("model.language_model.", "language_model.model."),
        ("model.", ""),
        ("lm_head.", "language_model.lm_head."),
    ),
    experts=("", ".switch_glu"),
    moved=r"\.depthwise_conv1d\.weight$",
)
INTERN = MLXNames(
    (
        ("vision_model.", "vision_model."),
        ("language_model.", "language_model."),
        ("mlp1.", "mlp1."),
    )
)
MINICPM = MLXNames(
    (
        ("vpm.", "vision_tower."),
        ("llm.", "language_model."),
        ("apm.", "audio_tower."),
        ("tts.", None),
        ("resampler.", "resampler."),
        ("audio_projection_layer.", "audio_projection_layer."),
    ),
    moved=r"^audio_tower\.conv\d\.weight$",
)
DOTS = MLXNames(
    (
        ("vision_tower.", "vision_tower."),
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.model.lm_head."),
    )
)
LLAMA4 = MLXNames(
    (
        ("vision_model.", "vision_model."),
        *PROJECTOR,
        *TEXT,
    ),
    experts=("", ""),
    also=(
        (r"\.feed_forward\.experts\.gate_proj\.weight$", ".mlp.gate_up.weight[0]"),
        (r"\.feed_forward\.experts\.up_proj\.weight$", ".mlp.gate_up.weight[1]"),
    ),
)
MOLMO = MLXNames(
    (
        ("model.vision_backbone.", "vision_tower."),
        ("model.transformer.", "language_model.model."),
    )
)
PHI3 = MLXNames((("model.", "model."), ("lm_head.", "lm_head.")))
PHI4 = MLXNames(
    (
        ("model.vision_tower.", "vision_tower."),
        ("model.mm_projector.0.", "mm_projector.linear_1."),
        ("model.mm_projector.2.", "mm_projector.linear_2."),
        *TEXT[2:],
        ("model.", "language_model.model."),
    )
)
DEEPSEEK_V2 = MLXNames(
    (
        ("vision.", "vision.vision_tower."),
        ("language.", "language_model."),
        ("projector.", "projector."),
        ("image_newline", "image_newline"),
        ("view_seperator", "view_separator"),
    )
)

# By the name of the family's file; the others are not written in MLX's layout.
NAMES: Mapping[str, MLXNames] = {
    "deepseek_vl_v2": DEEPSEEK_V2,
    "dots_ocr": DOTS,
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    "idefics2": IDEFICS,
    "idefics3": IDEFICS,
    "internvl_chat": INTERN,
    "llama4": LLAMA4,
    "llava": LLAVA,
    "llava_next": LLAVA,
    "minicpmo": MINICPM,
    "mistral3": PIXTRAL,
    "mllama": MLLAMA,
    "molmo": MOLMO,
    "paligemma": LLAVA,
    "phi3_v": PHI3,
    "phi4_siglip": PHI4,
    "qwen2_5_vl": QWEN,
    "qwen2_vl": QWEN,
    "qwen3_5": QWEN_LINEAR,
    "qwen3_5_moe": QWEN_LINEAR,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "smolvlm": IDEFICS,
}
