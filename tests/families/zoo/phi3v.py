"""Tiny Phi-3.5-vision checkpoints, named and laid out as Microsoft publishes them."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import byte_level, files, sentencepiece_like

SPECIAL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>")
LLAMA = files(
    sentencepiece_like(special=SPECIAL), bos="<s>", eos="<|endoftext|>", pad="<|endoftext|>"
)
PLAIN = files(byte_level(SPECIAL), eos="<|endoftext|>", pad="<|endoftext|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] "
    "+ '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != "
    "'assistant' %}{{- '<|assistant|>\\n' -}}{% endif %}"
)


def _case(variant: str, tokenizer: Any, config: dict, crops: int) -> Case:
    ids = tokenizer.ids
    whole = {
        "architectures": ["Phi3VForCausalLM"],
        "bos_token_id": 1,
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "eos_token_id": ids["<|endoftext|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "img_processor": {
            "image_dim_out": 24,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 4,
        },
        "intermediate_size": 96,
        "max_position_embeddings": 131072,
        "model_type": "phi3_v",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        # The published config leaves the tower's sizes to the code; tiny ones must be stated.
        "vision_config": {
            "hidden_size": 24,
            "image_size": 56,
            "intermediate_size": 40,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "patch_size": 14,
        },
        "vocab_size": tokenizer.size,
        **config,
    }
    return Case(
        family="phi3_v",
        variant=variant,
        model_class="",
        oracle="phi3_v",
        config=whole,
        tokenizer=tokenizer,
        chat_template=TEMPLATE,
        template_file="tokenizer_config.json",
        files={
            "preprocessor_config.json": {
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_processor_type": "Phi3VImageProcessor",
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "num_crops": crops,
                "num_img_tokens": 4,
                "processor_class": "Phi3VProcessor",
            }
        },
        large=(200, 100),
    )


SCALING = {
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0],
    "short_factor": [1.0, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5],
    "type": "su",
}

CASES: tuple[Case, ...] = (
    _case("llama_tokenizer", LLAMA, {"rope_scaling": SCALING}, 4),
    _case(
        "grouped_long",
        PLAIN,
        {
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 8,
            "rope_scaling": {**SCALING, "type": "longrope"},
        },
        16,
    ),
)
