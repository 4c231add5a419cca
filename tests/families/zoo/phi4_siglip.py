"""Tiny Phi-4-reasoning-vision checkpoints, named and laid out as Microsoft publishes them."""

from __future__ import annotations

from ..checkpoints import Case
from ..tiny_tokenizer import byte_level, files

TOKENIZER = files(
    byte_level(("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|dummy_0|>")),
    bos="<|endoftext|>",
    eos="<|im_end|>",
    pad="<|endoftext|>",
)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' "
    "+ message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


def _case(variant: str, config: dict, vision: dict) -> Case:
    ids = TOKENIZER.ids
    whole = {
        "architectures": ["Phi4ForCausalLMV"],
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "image_aspect_ratio": "square",
        "intermediate_size": 96,
        "max_num_patches": 60,
        "max_position_embeddings": 32768,
        "min_num_patches": 12,
        "mm_hidden_size": 24,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "google/siglip2-so400m-patch16-naflex",
        "model_type": "phi4-siglip",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": 32768,
        "pad_token_id": ids["<|endoftext|>"],
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 24,
            "intermediate_size": 40,
            "layer_norm_eps": 1e-6,
            "num_attention_heads": 2,
            "num_channels": 3,
            "num_hidden_layers": 3,
            "num_patches": 16,
            **vision,
        },
        "vocab_size": TOKENIZER.size,
        **config,
    }
    return Case(
        family="phi4-siglip",
        variant=variant,
        model_class="",
        oracle="phi4_siglip",
        config=whole,
        tokenizer=TOKENIZER,
        chat_template=TEMPLATE,
        template_file="tokenizer_config.json",
    )


CASES: tuple[Case, ...] = (
    _case("patch16", {}, {}),
    _case(
        "patch8_partial",
        {"num_key_value_heads": 4, "partial_rotary_factor": 0.5, "max_num_patches": 100},
        {"model_type": "siglip2_vision_model", "num_patches": 25, "patch_size": 8},
    ),
)
