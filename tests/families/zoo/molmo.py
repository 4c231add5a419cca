"""Tiny Molmo checkpoints, named and laid out as Ai2 publishes them."""

from __future__ import annotations

from ..checkpoints import Case
from ..tiny_tokenizer import byte_level, files

TOKENIZER = files(
    byte_level(("<|endoftext|>", "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>")),
    eos="<|endoftext|>",
    pad="<|endoftext|>",
)
TEMPLATE = (
    "{% for message in messages -%}\n"
    "{%- if (loop.index % 2 == 1 and message['role'] != 'user') or "
    "(loop.index % 2 == 0 and message['role'].lower() != 'assistant') -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif -%}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{%- if not loop.last -%}{{ ' ' }}{%- endif %}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' Assistant:' }}{%- endif %}"
)


def _case(variant: str, seed: int, config: dict, vision: dict, settings: dict) -> Case:
    # The pictures' tokens have rows of `new_embedding` alone, and none of the head.
    words = TOKENIZER.ids["<im_start>"]
    vision = {
        "image_default_input_size": [84, 84],
        "image_emb_dim": 24,
        "image_mlp_dim": 40,
        "image_norm_eps": 1e-5,
        "image_num_heads": 2,
        "image_num_layers": 5,
        "image_num_pos": 37,
        "image_patch_size": 14,
        **vision,
    }
    side = vision["image_default_input_size"][0]
    pooled = side // vision["image_patch_size"] // 2
    return Case(
        family="molmo",
        variant=variant,
        model_class="",
        oracle="molmo",
        config={
            "additional_vocab_size": 128,
            "architectures": ["MolmoForCausalLM"],
            "attention_layer_norm": False,
            "clip_qkv": None,
            "embedding_size": words,
            "hidden_size": 64,
            "intermediate_size": 192,
            "layer_norm_eps": 1e-6,
            "layer_norm_type": "rms",
            "max_position_embeddings": 4096,
            "model_type": "molmo",
            "norm_after": False,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "qkv_bias": True,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "use_position_ids": True,
            # The published config leaves the tower's sizes to the code; tiny ones must be stated.
            "vision_config": vision,
            "vit_layers": [-2, -4],
            "vocab_size": words,
            "weight_tying": False,
            **config,
        },
        tokenizer=TOKENIZER,
        chat_template=TEMPLATE,
        template_file="tokenizer_config.json",
        files={
            "preprocessor_config.json": {
                "base_image_input_size": [side, side],
                "do_normalize": True,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_padding_mask": True,
                "image_patch_size": vision["image_patch_size"],
                "image_processor_type": "MolmoImageProcessor",
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "image_token_length_h": pooled,
                "image_token_length_w": pooled,
                "max_crops": 6,
                "overlap_margins": [2, 2],
                "processor_class": "MolmoProcessor",
                **settings,
            }
        },
        seed=seed,
        images=1,
        two_turns=False,
        large=(200, 120),
        gains=((r"wte\.", 0.6),),
    )


CASES: tuple[Case, ...] = (
    _case("qwen", 1, {}, {}, {}),
    _case(
        "olmo",
        8,
        {
            "attention_layer_norm": True,
            "norm_after": True,
            "num_key_value_heads": None,
            "qkv_bias": False,
            "rope_theta": 500000.0,
        },
        {
            "image_default_input_size": [80, 80],
            "image_num_layers": 4,
            "image_num_pos": 101,
            "image_patch_size": 8,
        },
        {"max_crops": 8, "overlap_margins": [4, 4]},
    ),
)
