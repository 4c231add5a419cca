"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import QWEN_SPLIT, TokenizerFiles, byte_level, files
from . import templates

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN = ("<tool_call>", "</tool_call>", "<think>", "</think>")


def qwen_tokenizer(*, thinking: bool = False) -> TokenizerFiles:
    """The tokenizer of the Qwen families: byte-level, no beginning token."""
    extra = PLAIN if thinking else PLAIN[:2]
    tokenizer = byte_level((*SPECIAL, *extra), split=QWEN_SPLIT, plain=extra)
    return files(tokenizer, eos="<|im_end|>", pad="<|endoftext|>")


TOKENIZER = qwen_tokenizer()
IDS = TOKENIZER.ids


def _vision_ids() -> dict[str, int]:
    return {
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
        "vision_token_id": IDS["<|vision_pad|>"],
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
    }


def preprocessor(kind: str, patch: int, smallest: int, largest: int, **extra: Any) -> dict:
    """A preprocessor_config.json in the manner of Qwen2-VL's."""
    return {
        "min_pixels": smallest,
        "max_pixels": largest,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": kind,
        "processor_class": "Qwen2VLProcessor",
        **extra,
    }


GENERATION = {
    "bos_token_id": IDS["<|endoftext|>"],
    "eos_token_id": [IDS["<|im_end|>"], IDS["<|endoftext|>"]],
    "pad_token_id": IDS["<|endoftext|>"],
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
}


def _flat_text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": TOKENIZER.size + 7,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "max_window_layers": 3,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
        "use_sliding_window": False,
        "sliding_window": 32768,
        "attention_dropout": 0.0,
        "bos_token_id": IDS["<|endoftext|>"],
        "eos_token_id": IDS["<|im_end|>"],
        "torch_dtype": "float32",
        "use_cache": True,
        **changes,
    }


NEW_NAMES = (
    (r"^model\.(?!language_model|visual)", "model.language_model."),
    (r"^visual\.", "model.visual."),
)


def _qwen2_vl() -> tuple[Case, Case]:
    published = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **_vision_ids(),
        **_flat_text(tie_word_embeddings=True),
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "mlp_ratio": 4,
            "num_heads": 2,
            "in_chans": 3,
            "hidden_size": 48,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }
    saved = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "dtype": "float32",
        **_vision_ids(),
        "tie_word_embeddings": False,
        "text_config": {
            **_flat_text(hidden_size=60, num_attention_heads=3, num_key_value_heads=1),
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 4, 4]},
            "rope_theta": 10000.0,
            "model_type": "qwen2_vl_text",
        },
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 3,
            "embed_dim": 48,
            "mlp_ratio": 2,
            "num_heads": 3,
            "hidden_size": 60,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    return (
        Case(
            "qwen2_vl",
            "published_tied",
            "Qwen2VLForConditionalGeneration",
            published,
            TOKENIZER,
            templates.QWEN2_VL,
            "chat_template.json",
            {"preprocessor_config.json": preprocessor("Qwen2VLImageProcessor", 14, 3136, 12544)},
            GENERATION,
        ),
        Case(
            "qwen2_vl",
            "saved_untied",
            "Qwen2VLForConditionalGeneration",
            saved,
            TOKENIZER,
            templates.QWEN2_VL,
            files={
                "preprocessor_config.json": preprocessor("Qwen2VLImageProcessor", 8, 1024, 9000)
            },
            generation=GENERATION,
            manner="saved",
        ),
    )


def _qwen2_5_vl() -> tuple[Case, Case]:
    published = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **_vision_ids(),
        **_flat_text(tie_word_embeddings=True, num_attention_heads=2, num_key_value_heads=2),
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]},
        "vision_config": {
            "depth": 3,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 52,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": 48,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }
    saved = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "dtype": "float32",
        **_vision_ids(),
        "tie_word_embeddings": False,
        "text_config": {
            **_flat_text(hidden_size=64, num_attention_heads=4, num_key_value_heads=1),
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "model_type": "qwen2_5_vl_text",
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 48,
            "intermediate_size": 70,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "window_size": 48,
            "fullatt_block_indexes": [0, 2],
            "tokens_per_second": 4,
            "temporal_patch_size": 2,
        },
    }
    class_name = "Qwen2_5_VLForConditionalGeneration"
    return (
        Case(
            "qwen2_5_vl",
            "published_tied",
            class_name,
            published,
            TOKENIZER,
            templates.QWEN2_VL,
            "chat_template.json",
            {
                "preprocessor_config.json": preprocessor(
                    "Qwen2VLImageProcessor",
                    14,
                    3136,
                    15680,
                    processor_class="Qwen2_5_VLProcessor",
                )
            },
            GENERATION,
        ),
        Case(
            "qwen2_5_vl",
            "saved_untied",
            class_name,
            saved,
            TOKENIZER,
            templates.QWEN2_VL,
            files={
                "preprocessor_config.json": preprocessor(
                    "Qwen2VLImageProcessorFast",
                    8,
                    1024,
                    9216,
                    size={"shortest_edge": 1024, "longest_edge": 9216},
                    min_pixels=None,
                    max_pixels=None,
                    processor_class="Qwen2_5_VLProcessor",
                )
            },
            generation=GENERATION,
            manner="saved",
            rename=NEW_NAMES,
        ),
    )


def qwen3_vision(**changes: Any) -> dict[str, Any]:
    """The vision_config of Qwen3-VL and Qwen3.5."""
    return {
        "model_type": "qwen3_vl",
        "deepstack_visual_indexes": [0, 2],
        "depth": 3,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 56,
        "num_heads": 2,
        "num_position_embeddings": 36,
        "out_hidden_size": 48,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **changes,
    }


def qwen3_text(model_type: str, **changes: Any) -> dict[str, Any]:
    """The text_config of Qwen3-VL."""
    return {
        "model_type": model_type,
        "vocab_size": TOKENIZER.size + 3,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": IDS["<|endoftext|>"],
        "eos_token_id": IDS["<|im_end|>"],
        "dtype": "float32",
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 262144,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        **changes,
    }


def qwen3_preprocessor(largest: int, **extra: Any) -> dict:
    """A preprocessor_config.json in the manner of Qwen3-VL's."""
    return {
        "size": {"longest_edge": largest, "shortest_edge": 2048},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
        **extra,
    }


def _qwen3_vl() -> tuple[Case, Case]:
    published = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **_vision_ids(),
        "tie_word_embeddings": True,
        "text_config": qwen3_text("qwen3_vl_text"),
        "vision_config": qwen3_vision(),
    }
    saved = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": "float32",
        **_vision_ids(),
        "tie_word_embeddings": False,
        "text_config": qwen3_text(
            "qwen3_vl_text",
            tie_word_embeddings=False,
            hidden_size=40,
            head_dim=20,
            num_attention_heads=3,
            num_key_value_heads=1,
            num_hidden_layers=2,
            attention_bias=True,
            rope_scaling={
                "mrope_interleaved": True,
                "mrope_section": [4, 3, 3],
                "rope_type": "default",
            },
        ),
        "vision_config": qwen3_vision(
            depth=4,
            deepstack_visual_indexes=[3],
            hidden_size=48,
            num_heads=4,
            out_hidden_size=40,
            num_position_embeddings=49,
        ),
    }
    class_name = "Qwen3VLForConditionalGeneration"
    return (
        Case(
            "qwen3_vl",
            "published_tied",
            class_name,
            published,
            TOKENIZER,
            templates.QWEN3_VL,
            "chat_template.json",
            {"preprocessor_config.json": qwen3_preprocessor(16384)},
            GENERATION,
        ),
        Case(
            "qwen3_vl",
            "saved_untied",
            class_name,
            saved,
            TOKENIZER,
            templates.QWEN3_VL,
            files={"preprocessor_config.json": qwen3_preprocessor(12288)},
            generation=GENERATION,
            manner="saved",
        ),
    )


CASES: tuple[Case, ...] = (*_qwen2_vl(), *_qwen2_5_vl(), *_qwen3_vl())
