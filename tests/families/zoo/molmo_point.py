"""Tiny MolmoPoint checkpoints, named and laid out as Ai2 publishes them."""

from __future__ import annotations

from ..checkpoints import Case
from ..tiny_tokenizer import byte_level, files

# In this order, after the words, stand the tokens that have rows of their own in both tables.
ADDED = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<|image|>",
    "<im_low>",
    "<frame_start>",
    "<frame_end>",
    "<|video|>",
    "<|points|>",
    "<|token_index|>",
    "<|vit_index|>",
    "<|vit_loc|>",
    "<|extra_0|>",
    "<|extra_1|>",
)
POINTS = tuple(f"<POINT_{i}>" for i in range(200))
TOKENIZER = files(
    byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>", *ADDED, *POINTS)),
    bos="<|im_end|>",
    eos="<|im_end|>",
    pad="<|endoftext|>",
)
TEMPLATE = (
    "{% set images = namespace(count=0) %}{% for message in messages %}"
    "{% if message['content'] is not string %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set images.count = images.count + 1 %}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if images.count == 1 %}{{ '<|image|>' }}{% elif images.count > 1 %}"
    "{% for i in range(images.count) %}{{ 'Image ' ~ (i + 1) ~ '<|image|>' }}{% endfor %}"
    "{% endif %}{% for message in messages %}{% if message['content'] is string %}"
    "{% set text_content = message['content'] %}{% else %}{% set m = namespace(text='') %}"
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}"
    "{% set m.text = m.text ~ ('' if not m.text else ' ') ~ content['text'] %}{% endif %}"
    "{% endfor %}{% set text_content = m.text %}{% endif %}"
    "{% if message['role'] == 'user' %}{% if not loop.first %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>user\\n' }}{{ text_content }}{{ '<|im_end|>\\n' }}{% else %}"
    "{{ '<|im_start|>assistant\\n' }}{{ text_content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _case(variant: str, seed: int, config: dict, vit: dict, adapter: dict, settings: dict) -> Case:
    ids = TOKENIZER.ids
    words = ids["<im_start>"]
    vit = {
        "head_dim": 12,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 24,
        "image_default_input_size": [70, 70],
        "image_num_pos": 25,
        "image_patch_size": 14,
        "intermediate_size": 40,
        "layer_norm_eps": 1e-6,
        "model_type": "molmo2",
        "num_attention_heads": 2,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        **vit,
    }
    side = vit["image_default_input_size"][0]
    return Case(
        family="molmo_point",
        variant=variant,
        model_class="",
        oracle="molmo_point",
        config={
            "adapter_config": {
                "attention_pooling_out_layer": False,
                "head_dim": 12,
                "hidden_act": "silu",
                "hidden_size": 24,
                "intermediate_size": 56,
                "model_type": "molmo_point",
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "pooling_attention_mask": False,
                "positional_embeddings": None,
                "text_hidden_size": 64,
                "vit_layers": [-2, -4],
                **adapter,
            },
            "architectures": ["MolmoPointForConditionalGeneration"],
            "embed_location": False,
            "embed_selected_vit_patch": "linear",
            "frame_end_token_id": ids["<frame_end>"],
            "frame_start_token_id": ids["<frame_start>"],
            "image_col_id": ids["<im_col>"],
            "image_end_token_id": ids["<im_end>"],
            "image_high_res_id": ids["<im_patch>"],
            "image_non_indexable_patch_id": ids["<im_low>"],
            "image_patch_id": ids["<im_patch>"],
            "image_start_token_id": ids["<im_start>"],
            "layer_norm_x": True,
            "location_token_id": ids["<|vit_loc|>"],
            "low_res_image_start_token_id": ids["<low_res_im_start>"],
            "mask_patches": "always",
            "mask_repeats": "inference",
            "mask_subpatches": "inference",
            "model_type": "molmo_point",
            "no_more_points_class": True,
            "norm_logits": True,
            "patch_embed_dim": 32,
            "patch_embedding_kind": "image_feature0",
            "patch_location": "3x3",
            "patch_token_id": ids["<|token_index|>"],
            "subpatch_token_id": ids["<|vit_index|>"],
            "text_config": {
                "additional_vocab_size": len(ADDED),
                "head_dim": 16,
                "hidden_act": "silu",
                "hidden_size": 64,
                "intermediate_size": 96,
                "layer_norm_eps": 1e-6,
                "max_position_embeddings": 37376,
                "model_type": "molmo2_text",
                "norm_after": False,
                "num_attention_heads": 4,
                "num_hidden_layers": 3,
                "num_key_value_heads": 2,
                "qk_norm_type": "qwen3",
                "qkv_bias": False,
                "rope_scaling": None,
                "rope_scaling_layers": None,
                "rope_theta": 1000000.0,
                "tie_word_embeddings": False,
                "use_qk_norm": True,
                "vocab_size": words,
            },
            "tie_word_embeddings": False,
            "token_prediction_rotary": "one_d",
            "token_prediction_rotary_theta": 50000.0,
            "use_frame_special_tokens": True,
            "vit_config": vit,
            **config,
        },
        tokenizer=TOKENIZER,
        chat_template=TEMPLATE,
        files={
            "preprocessor_config.json": {
                "do_convert_rgb": True,
                "image_mean": [0.5, 0.5, 0.5],
                "image_processor_type": "Molmo2ImageProcessor",
                "image_std": [0.5, 0.5, 0.5],
                "max_crops": 6,
                "overlap_margins": [1, 1],
                "patch_size": vit["image_patch_size"],
                "pooling_size": [2, 2],
                "processor_class": "Molmo2Processor",
                "resample": 2,
                "size": {"height": side, "width": side},
                **settings,
            },
            "processor_config.json": {
                "image_use_col_tokens": True,
                "processor_class": "Molmo2Processor",
                "use_low_res_token_for_global_crops": True,
                "use_single_crop_col_tokens": False,
                "use_single_crop_start_token": True,
            },
        },
        seed=seed,
        large=(150, 100),
        # The words that points are said with, and their neighbours, are said more than others.
        gains=((r"new_output_embeddings$", 0.5), (r"output_embeddings$", 0.3), (r"wte\.", 0.6)),
    )


CASES: tuple[Case, ...] = (
    _case("odd_crops", 5, {}, {}, {}, {}),
    _case(
        "even_crops",
        9,
        {"mask_patches": None, "mask_repeats": None, "token_prediction_rotary_theta": 500.0},
        {
            "image_default_input_size": [64, 64],
            "image_num_pos": 64,
            "image_patch_size": 8,
            "num_hidden_layers": 5,
        },
        {"pooling_attention_mask": True, "vit_layers": [-3, -1]},
        {"max_crops": 3, "overlap_margins": [2, 2], "pooling_size": [3, 2]},
    ),
)
