"""Tiny MiniCPM-o checkpoints, named and laid out as their authors publish them."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import QWEN_SPLIT, byte_level, files

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<unk>",
    "<image>",
    "</image>",
    "<slice>",
    "</slice>",
    "<image_id>",
    "</image_id>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|tts_bos|>",
    "<|tts_eos|>",
)
TOKENIZER = files(
    byte_level(SPECIAL, split=QWEN_SPLIT),
    eos="<|im_end|>",
    pad="<|endoftext|>",
    unk="<unk>",
)
TURNS = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
)
# Qwen2.5's, shortened, and what MiniCPM-o 4.5 adds to Qwen3's.
EARLIER_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    + TURNS
    + "{%- endif %}"
)
LATER_TEMPLATE = (
    TURNS
    + "{%- if enable_thinking is defined and enable_thinking is false %}"
    + "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    + "{%- if use_tts_template is defined and use_tts_template is true %}"
    + "{{- '<|tts_bos|>' }}{%- endif %}{%- endif %}"
)


def _case(
    variant: str,
    template: str,
    large: tuple[int, int],
    own: dict[str, Any],
    vision: dict[str, Any],
) -> Case:
    config = {
        "architectures": ["MiniCPMO"],
        "audio_chunk_length": 1.0,
        "audio_config": {
            "d_model": 32,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "encoder_layers": 2,
            "max_source_positions": 1500,
            "num_mel_bins": 80,
        },
        "drop_vision_last_layer": False,
        "hidden_act": "silu",
        "hidden_size": 128,
        "init_audio": True,
        "init_tts": True,
        "init_vision": True,
        "intermediate_size": 160,
        "max_position_embeddings": 8192,
        "model_type": "minicpmo",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "patch_size": 14,
        "query_num": 6,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_image_id": True,
        "vision_config": {
            "hidden_size": 24,
            "image_size": 980,
            "intermediate_size": 40,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "patch_size": 14,
            **vision,
        },
        "vocab_size": TOKENIZER.size,
        **own,
    }
    return Case(
        family="minicpmo",
        variant=variant,
        model_class="",
        oracle="minicpmo",
        config=config,
        tokenizer=TOKENIZER,
        chat_template=template,
        template_file="tokenizer_config.json",
        files={
            "preprocessor_config.json": {
                "image_feature_size": config["query_num"],
                "image_processor_type": "MiniCPMVImageProcessor",
                "max_slice_nums": 9,
                "norm_mean": [0.5, 0.5, 0.5],
                "norm_std": [0.5, 0.5, 0.5],
                "patch_size": 14,
                "processor_class": "MiniCPMOProcessor",
                "scale_resolution": 56,
                "slice_mode": True,
                "use_image_id": True,
            }
        },
        audio=True,
        large=large,
    )


CASES: tuple[Case, ...] = (
    _case(
        "later",
        LATER_TEMPLATE,
        (1000, 20),  # 25 patches wide, some just between two of the table's 70 places
        {"attention_bias": False, "audio_pool_step": 5, "head_dim": 40, "version": "4.5"},
        {},
    ),
    _case(
        "earlier",
        EARLIER_TEMPLATE,
        (200, 130),
        {
            "audio_pool_step": 2,
            "drop_vision_last_layer": True,
            "hidden_size": 256,
            "query_num": 9,
            "rms_norm_eps": 1e-5,
            "version": "2.6",
        },
        {"image_size": 140, "num_attention_heads": 3},
    ),
)
