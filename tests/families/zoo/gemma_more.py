"""Tiny Gemma 4 checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import files, sentencepiece_like
from . import templates
from .gemma import GEMMA_FIRST

NAMED = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
GEMMA4 = files(
    sentencepiece_like(
        GEMMA_FIRST,
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>", *NAMED.values(), "<|video|>"),
        bos="<bos>",
        prefix_space=False,
    ),
    bos="<bos>",
    eos="<eos>",
    pad="<pad>",
    unk="<unk>",
    extra={"extra_special_tokens": NAMED, **NAMED},
)


def _gemma4() -> tuple[Case, Case]:
    class_name = "Gemma4ForConditionalGeneration"
    ids = GEMMA4.ids

    def config(
        text: dict[str, Any], vision: dict[str, Any], audio: dict[str, Any] | None
    ) -> dict[str, Any]:
        sound = {
            "model_type": "gemma4_audio",
            "attention_chunk_size": 4,
            "attention_context_left": 5,
            "attention_context_right": 0,
            "attention_logit_cap": 50.0,
            "conv_kernel_size": 5,
            "hidden_act": "silu",
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "output_proj_dims": 40,
            "residual_weight": 0.5,
            "rms_norm_eps": 1e-6,
            "subsampling_conv_channels": [128, 4],
            "use_clipped_linears": True,
        }
        return {
            "architectures": [class_name],
            "audio_config": None if audio is None else sound | audio,
            "audio_token_id": ids["<|audio|>"],
            "boa_token_id": ids["<|audio>"],
            "boi_token_id": ids["<|image>"],
            "dtype": "float32",
            "eoa_token_index": ids["<audio|>"],
            "eoi_token_id": ids["<image|>"],
            "eos_token_id": [1, ids["<turn|>"]],
            "image_token_id": ids["<|image|>"],
            "model_type": "gemma4",
            "text_config": {
                "model_type": "gemma4_text",
                "attention_k_eq_v": False,
                "enable_moe_block": False,
                "final_logit_softcapping": 30.0,
                "global_head_dim": 24,
                "head_dim": 12,
                "hidden_activation": "gelu_pytorch_tanh",
                "hidden_size": 48,
                "hidden_size_per_layer_input": 8,
                "intermediate_size": 80,
                "layer_types": [
                    "sliding_attention",
                    "full_attention",
                    "sliding_attention",
                    "full_attention",
                ],
                "max_position_embeddings": 131072,
                "num_attention_heads": 4,
                "num_global_key_value_heads": None,
                "num_hidden_layers": 4,
                "num_key_value_heads": 1,
                "num_kv_shared_layers": 2,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {
                    "full_attention": {
                        "partial_rotary_factor": 0.25,
                        "rope_theta": 1000000.0,
                        "rope_type": "proportional",
                    },
                    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
                },
                "sliding_window": 20,
                "tie_word_embeddings": True,
                "use_bidirectional_attention": None,
                "use_double_wide_mlp": True,
                "vocab_size": GEMMA4.size + 3,
                "vocab_size_per_layer_input": GEMMA4.size + 3,
                **text,
            },
            "tie_word_embeddings": True,
            "video_token_id": ids["<|video|>"],
            "vision_config": {
                "model_type": "gemma4_vision",
                "attention_bias": False,
                "head_dim": 16,
                "hidden_activation": "gelu_pytorch_tanh",
                "hidden_size": 32,
                "intermediate_size": 56,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "patch_size": 4,
                "pooling_kernel_size": 3,
                "position_embedding_size": 240,
                "rms_norm_eps": 1e-6,
                "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
                "standardize": False,
                "use_clipped_linears": False,
                **vision,
            },
            "vision_soft_tokens_per_image": 70,
        }

    processor = {
        "audio_ms_per_token": 40,
        "audio_seq_length": 750,
        "feature_extractor": {
            "feature_extractor_type": "Gemma4AudioFeatureExtractor",
            "feature_size": 128,
            "sampling_rate": 16000,
        },
        "image_processor": {
            "do_convert_rgb": True,
            "do_normalize": False,
            "do_rescale": True,
            "do_resize": True,
            "image_processor_type": "Gemma4ImageProcessor",
            "max_soft_tokens": 70,
            "patch_size": 4,
            "pooling_kernel_size": 3,
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
        },
        "image_seq_length": 70,
        "processor_class": "Gemma4Processor",
    }
    generation = {
        "bos_token_id": 2,
        "eos_token_id": [1, ids["<turn|>"]],
        "pad_token_id": 0,
        "do_sample": True,
        "top_k": 64,
        "top_p": 0.95,
    }
    effective = config({}, {}, {})
    experts = config(
        {
            "attention_k_eq_v": True,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "moe_intermediate_size": 16,
            "num_experts": 5,
            "num_global_key_value_heads": 1,
            "num_key_value_heads": 2,
            "num_kv_shared_layers": 0,
            "top_k_experts": 2,
            "use_bidirectional_attention": "vision",
            "use_double_wide_mlp": False,
        },
        {"standardize": True, "num_hidden_layers": 3},
        None,
    )
    gains = ((r"embed_tokens", 0.3),)
    return (
        Case(
            "gemma4",
            "effective",
            class_name,
            effective,
            GEMMA4,
            templates.GEMMA4,
            files={"processor_config.json": processor},
            generation=generation,
            gains=gains,
            audio=True,
        ),
        Case(
            "gemma4",
            "experts",
            class_name,
            experts,
            GEMMA4,
            templates.GEMMA4,
            files={"processor_config.json": processor},
            generation=generation,
            gains=gains,
            manner="saved",
        ),
    )


CASES: tuple[Case, ...] = _gemma4()
