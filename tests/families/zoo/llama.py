"""Tiny Llama 3.2 Vision and Llama 4 checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import byte_level, files
from . import templates

MLLAMA_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|finetune_right_pad_id|>",
    "<|image|>",
)
MLLAMA = files(
    byte_level(MLLAMA_SPECIAL, bos="<|begin_of_text|>"),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
    pad="<|finetune_right_pad_id|>",
)


def _mllama() -> tuple[Case, Case]:
    class_name = "MllamaForConditionalGeneration"
    ids = MLLAMA.ids

    def config(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": [class_name],
            "image_token_index": ids["<|image|>"],
            "model_type": "mllama",
            "text_config": {
                "model_type": "mllama_text_model",
                "bos_token_id": ids["<|begin_of_text|>"],
                "cross_attention_layers": [1, 3],
                "eos_token_id": [ids["<|end_of_text|>"], ids["<|eot_id|>"]],
                "hidden_act": "silu",
                "hidden_size": 48,
                "intermediate_size": 88,
                "max_position_embeddings": 131072,
                "num_attention_heads": 4,
                "num_hidden_layers": 4,
                "num_key_value_heads": 2,
                "pad_token_id": ids["<|finetune_right_pad_id|>"],
                "rms_norm_eps": 1e-5,
                "rope_scaling": {
                    "factor": 8.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 64,
                    "rope_type": "llama3",
                },
                "rope_theta": 500000.0,
                "tie_word_embeddings": False,
                "torch_dtype": "float32",
                # The picture's token has no row in the head; its embedding is one of eight more.
                "vocab_size": ids["<|image|>"],
                **text,
            },
            "torch_dtype": "float32",
            "vision_config": {
                "model_type": "mllama_vision_model",
                "attention_heads": 2,
                "hidden_act": "gelu",
                "hidden_size": 32,
                "image_size": 28,
                "intermediate_layers_indices": [0, 1],
                "intermediate_size": 48,
                "max_num_tiles": 4,
                "norm_eps": 1e-5,
                "num_channels": 3,
                "num_global_layers": 1,
                "num_hidden_layers": 3,
                "patch_size": 14,
                "supported_aspect_ratios": [
                    [1, 1],
                    [1, 2],
                    [1, 3],
                    [1, 4],
                    [2, 1],
                    [2, 2],
                    [3, 1],
                    [4, 1],
                ],
                "vision_output_dim": 96,
                **vision,
            },
        }

    first = config({}, {})
    second = config(
        {
            "cross_attention_layers": [2],
            "num_hidden_layers": 3,
            "hidden_size": 40,
            "num_key_value_heads": 4,
            "rope_scaling": None,
        },
        {
            "image_size": 30,
            "patch_size": 10,
            "intermediate_layers_indices": [2],
            "num_global_layers": 2,
            "vision_output_dim": 64,
        },
    )

    def preprocessor(size: int) -> dict[str, Any]:
        return {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "MllamaImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_image_tiles": 4,
            "processor_class": "MllamaProcessor",
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": size, "width": size},
        }

    generation = {
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom_id|>"], ids["<|eot_id|>"]],
        "pad_token_id": ids["<|finetune_right_pad_id|>"],
    }
    gains = ((r"gate", 12.0), (r"multi_modal_projector", 3.0))
    return (
        Case(
            "mllama",
            "two_cross_layers",
            class_name,
            first,
            MLLAMA,
            templates.LLAMA3_VISION,
            "chat_template.json",
            {"preprocessor_config.json": preprocessor(28)},
            generation,
            gains=gains,
        ),
        Case(
            "mllama",
            "last_layer_crosses",
            class_name,
            second,
            MLLAMA,
            templates.LLAMA3_VISION,
            files={"preprocessor_config.json": preprocessor(30)},
            generation=generation,
            manner="saved",
            gains=gains,
        ),
    )


LLAMA4_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|finetune_right_pad|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
    "<|python_start|>",
    "<|python_end|>",
)
LLAMA4 = files(
    byte_level(LLAMA4_SPECIAL, bos="<|begin_of_text|>"),
    bos="<|begin_of_text|>",
    eos="<|eot|>",
    pad="<|finetune_right_pad|>",
)


def _llama4() -> tuple[Case, Case]:
    class_name = "Llama4ForConditionalGeneration"
    ids = LLAMA4.ids

    def config(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": [class_name],
            "boi_token_index": ids["<|image_start|>"],
            "eoi_token_index": ids["<|image_end|>"],
            "image_token_index": ids["<|patch|>"],
            "model_type": "llama4",
            "text_config": {
                "model_type": "llama4_text",
                "attention_bias": False,
                "attention_chunk_size": 16,
                "attn_scale": 0.1,
                "attn_temperature_tuning": True,
                "bos_token_id": ids["<|begin_of_text|>"],
                "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]],
                "floor_scale": 8,
                "for_llm_compressor": False,
                "head_dim": 16,
                "hidden_act": "silu",
                "hidden_size": 48,
                "interleave_moe_layer_step": 1,
                "intermediate_size": 40,
                "intermediate_size_mlp": 76,
                "max_position_embeddings": 10485760,
                "num_attention_heads": 4,
                "num_experts_per_tok": 1,
                "num_hidden_layers": 4,
                "num_key_value_heads": 2,
                "num_local_experts": 4,
                "pad_token_id": ids["<|finetune_right_pad|>"],
                "rms_norm_eps": 1e-5,
                "rope_scaling": {
                    "factor": 8.0,
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 64,
                    "rope_type": "llama3",
                },
                "rope_theta": 500000.0,
                "tie_word_embeddings": False,
                "torch_dtype": "float32",
                "use_qk_norm": True,
                "vocab_size": LLAMA4.size + 1,
                **text,
            },
            "torch_dtype": "float32",
            "vision_config": {
                "model_type": "llama4_vision_model",
                "hidden_act": "gelu",
                "hidden_size": 32,
                "image_size": 56,
                "intermediate_size": 128,
                "multi_modal_projector_bias": False,
                "norm_eps": 1e-5,
                "num_attention_heads": 2,
                "num_channels": 3,
                "num_hidden_layers": 2,
                "patch_size": 14,
                "pixel_shuffle_ratio": 0.5,
                "projector_input_dim": 36,
                "projector_output_dim": 36,
                "rope_theta": 10000,
                "vision_feature_layer": -1,
                "vision_feature_select_strategy": "default",
                "vision_output_dim": 36,
                **vision,
            },
        }

    scout = config({}, {})
    maverick = config(
        {
            "interleave_moe_layer_step": 2,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "use_qk_norm": False,
            "rope_scaling": None,
            "no_rope_layer_interval": 3,
            "attention_chunk_size": 24,
            "attn_temperature_tuning": False,
            "hidden_size": 40,
            "num_key_value_heads": 1,
        },
        {"image_size": 48, "patch_size": 12, "num_hidden_layers": 3},
    )

    def preprocessor(size: int, most: int) -> dict[str, Any]:
        return {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Llama4ImageProcessorFast",
            "image_std": [0.5, 0.5, 0.5],
            "max_patches": most,
            "processor_class": "Llama4Processor",
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "resize_to_max_canvas": False,
            "size": {"height": size, "width": size},
        }

    def processor(patch: int) -> dict[str, Any]:
        return {
            "fake_image_token": "<|image|>",
            "image_token": "<|image|>",
            "patch_size": patch,
            "processor_class": "Llama4Processor",
        }

    generation = {
        "bos_token_id": ids["<|begin_of_text|>"],
        "eos_token_id": [ids["<|end_of_text|>"], ids["<|eom|>"], ids["<|eot|>"]],
        "pad_token_id": ids["<|finetune_right_pad|>"],
    }
    return (
        Case(
            "llama4",
            "every_layer_moe",
            class_name,
            scout,
            LLAMA4,
            templates.LLAMA4,
            "chat_template.json",
            {
                "preprocessor_config.json": preprocessor(56, 16),
                "processor_config.json": processor(14),
            },
            generation,
            needs=("torchvision",),
        ),
        Case(
            "llama4",
            "interleaved_moe",
            class_name,
            maverick,
            LLAMA4,
            templates.LLAMA4,
            files={
                "preprocessor_config.json": preprocessor(48, 4),
                "processor_config.json": processor(12),
            },
            generation=generation,
            manner="saved",
            needs=("torchvision",),
        ),
    )


CASES: tuple[Case, ...] = (*_mllama(), *_llama4())
