"""Tiny Gemma 3 and PaliGemma checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import files, sentencepiece_like
from . import templates

GEMMA_FIRST = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
GEMMA3_SPECIAL = (
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
)
NAMED = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}
GEMMA3 = files(
    sentencepiece_like(GEMMA_FIRST, GEMMA3_SPECIAL, bos="<bos>", prefix_space=False),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    unk="<unk>",
    extra={"extra_special_tokens": NAMED, **NAMED},
)


def siglip_vision(**changes: Any) -> dict[str, Any]:
    """A SigLIP tower's vision_config."""
    return {
        "model_type": "siglip_vision_model",
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "image_size": 48,
        "intermediate_size": 56,
        "layer_norm_eps": 1e-6,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 8,
        "vision_use_head": False,
        **changes,
    }


def _gemma3() -> tuple[Case, Case]:
    class_name = "Gemma3ForConditionalGeneration"
    ids = GEMMA3.ids

    def config(tokens: int, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": [class_name],
            "boi_token_index": ids["<start_of_image>"],
            "eoi_token_index": ids["<end_of_image>"],
            "eos_token_id": [1, ids["<end_of_turn>"]],
            "image_token_index": ids["<image_soft_token>"],
            "initializer_range": 0.02,
            "mm_tokens_per_image": tokens,
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 48,
                "intermediate_size": 84,
                "model_type": "gemma3_text",
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "num_hidden_layers": 3,
                "query_pre_attn_scalar": 16,
                "sliding_window": 24,
                "vocab_size": GEMMA3.size + 3,
                **text,
            },
            "torch_dtype": "float32",
            "vision_config": siglip_vision(**vision),
        }

    linear = {
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 2,
    }
    small = config(9, linear, {})
    large = config(
        4,
        {
            "hidden_size": 40,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 11,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
        },
        {"image_size": 60, "patch_size": 10, "hidden_size": 48, "num_attention_heads": 3},
    )
    large["tie_word_embeddings"] = False

    def preprocessor(size: int, *, pan: bool) -> dict[str, Any]:
        return {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_pan_and_scan": True if pan else None,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": 4 if pan else 9,
            "image_std": [0.5, 0.5, 0.5],
            "pan_and_scan_max_num_crops": 3 if pan else None,
            "pan_and_scan_min_crop_size": 24 if pan else None,
            "pan_and_scan_min_ratio_to_activate": 1.2 if pan else None,
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": size, "width": size},
        }

    generation = {
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "do_sample": True,
        "eos_token_id": [1, ids["<end_of_turn>"]],
        "pad_token_id": 0,
        "top_k": 64,
        "top_p": 0.95,
    }
    return (
        Case(
            "gemma3",
            "published",
            class_name,
            small,
            GEMMA3,
            templates.GEMMA3,
            "chat_template.json",
            {
                "preprocessor_config.json": preprocessor(48, pan=False),
                "processor_config.json": {
                    "image_seq_length": 9,
                    "processor_class": "Gemma3Processor",
                },
            },
            generation,
            rename=(
                (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
                (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
                (r"^model\.language_model\.", "language_model.model."),
            ),
            gains=((r"embed_tokens", 0.2),),
        ),
        Case(
            "gemma3",
            "pan_and_scan_capped",
            class_name,
            large,
            GEMMA3,
            templates.GEMMA3,
            files={
                "preprocessor_config.json": preprocessor(60, pan=True),
                "processor_config.json": {
                    "image_seq_length": 4,
                    "processor_class": "Gemma3Processor",
                },
            },
            generation=generation,
            manner="saved",
            processor_kwargs={
                "do_pan_and_scan": True,
                "pan_and_scan_max_num_crops": 3,
                "pan_and_scan_min_crop_size": 24,
                "pan_and_scan_min_ratio_to_activate": 1.2,
            },
        ),
    )


LOCATIONS = tuple(f"<loc{index:04d}>" for index in range(1024))
SEGMENTS = tuple(f"<seg{index:03d}>" for index in range(128))
PALIGEMMA = files(
    sentencepiece_like(
        GEMMA_FIRST,
        (*LOCATIONS, *SEGMENTS, "<image>"),
        bos="<bos>",
        prefix_space=False,
        plain=(*LOCATIONS, *SEGMENTS),
    ),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    unk="<unk>",
    extra={"extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>"},
)


def _paligemma() -> tuple[Case, Case]:
    class_name = "PaliGemmaForConditionalGeneration"

    def config(text: dict[str, Any], vision: dict[str, Any], width: int) -> dict[str, Any]:
        return {
            "architectures": [class_name],
            "bos_token_id": 2,
            "eos_token_id": 1,
            "hidden_size": width,
            "ignore_index": -100,
            "image_token_index": PALIGEMMA.ids["<image>"],
            "model_type": "paligemma",
            "pad_token_id": 0,
            "projection_dim": width,
            "text_config": {
                "hidden_size": width,
                "intermediate_size": 90,
                "num_hidden_layers": 3,
                "torch_dtype": "float32",
                "vocab_size": PALIGEMMA.size,
                **text,
            },
            "torch_dtype": "float32",
            "vision_config": siglip_vision(projection_dim=width, projector_hidden_act="gelu_fast")
            | vision,
        }

    first = config(
        {
            "model_type": "gemma",
            "num_attention_heads": 4,
            "num_image_tokens": 36,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
        {},
        48,
    )
    second = config(
        {
            "model_type": "gemma2",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "head_dim": 12,
            "hidden_activation": "gelu_pytorch_tanh",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
        },
        {"image_size": 42, "patch_size": 14, "num_hidden_layers": 3},
        40,
    )

    def preprocessor(size: int, tokens: int) -> dict[str, Any]:
        return {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_seq_length": tokens,
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "PaliGemmaProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": size, "width": size},
        }

    generation = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    old_names = (
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
        (r"^model\.language_model\.", "language_model.model."),
    )
    return (
        Case(
            "paligemma",
            "one",
            class_name,
            first,
            PALIGEMMA,
            files={"preprocessor_config.json": preprocessor(48, 36)},
            generation=generation,
            rename=old_names,
            text_only=False,
            two_turns=False,
            gains=((r"embed_tokens", 0.2),),
        ),
        Case(
            "paligemma",
            "two",
            class_name,
            second,
            PALIGEMMA,
            files={"preprocessor_config.json": preprocessor(42, 9)},
            generation=generation,
            manner="saved",
            text_only=False,
            two_turns=False,
            gains=((r"embed_tokens", 0.2),),
        ),
    )


CASES: tuple[Case, ...] = (*_gemma3(), *_paligemma())
