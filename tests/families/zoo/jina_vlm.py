"""Tiny jina-vlm checkpoints, named and laid out as Jina AI publishes them."""

from __future__ import annotations

from ..checkpoints import Case
from ..tiny_tokenizer import QWEN_SPLIT, byte_level, files

# The pictures' tokens come after all others: they have rows of `new_embedding` alone.
PICTURES = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<|image|>", "<im_slice>")
TOKENIZER = files(
    byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>", *PICTURES), split=QWEN_SPLIT),
    eos="<|endoftext|>",
    pad="<|endoftext|>",
)
WORDS = TOKENIZER.ids["<im_start>"]
TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{%- if (loop.index % 2 == 1) != (message['role'] == 'user') -%}\n"
    "{{- raise_exception('Conversation roles must alternate user/assistant/...') -}}\n"
    "{%- endif -%}\n"
    "{%- if not loop.first or always_start_with_space -%}{{- ' ' -}}{%- endif -%}\n"
    "{{- message['role'].capitalize() + ': ' -}}\n"
    "{%- if message['content'] is string -%}{{- message['content'] -}}\n"
    "{%- else -%}\n"
    "{%- for part in message['content'] -%}\n"
    "{%- if part['type'] == 'image' -%}{{- image_prompt_token -}}\n"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- ' Assistant:' -}}{%- endif -%}\n"
)
RMS = {"bias": False, "eps": 1e-6, "type": "rms", "with_affine": True}
LAYER_NORM = {"bias": True, "eps": 1e-6, "type": "default", "with_affine": True}


def _attention(heads: int, kv_heads: int | None, dim: int, norm: dict, **more: object) -> dict:
    return {
        "clip_qkv": None,
        "dropout": 0.0,
        "fp32": False,
        "head_dim": dim,
        "inner_lnorm": False,
        "k_bias": False,
        "k_lnorm": False,
        "lnorm_config": norm,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "o_bias": False,
        "o_lnorm": False,
        "q_bias": False,
        "q_lnorm": False,
        "qkv_lnorm_on_heads": False,
        "sliding_window": -1,
        "softmax_scale": None,
        "v_bias": False,
        "v_lnorm": False,
        **more,
    }


def _feed_forward(kind: str, size: int, gated: bool, bias: bool) -> dict:
    return {
        "activation_type": kind,
        "bias": bias,
        "gated_activation": gated,
        "inner_lnorm": False,
        "lnorm_config": LAYER_NORM,
        "ratio": 4,
        "size": size,
    }


def _blocks(attention: dict, feed_forward: dict, norm: dict) -> dict:
    return {
        "attn_config": attention,
        "attn_lscale_init": None,
        "ffn_config": feed_forward,
        "ffn_lscale_init": None,
        "lnorm_config": norm,
        "postnorm": False,
        "residual_dropout": 0.0,
        "residual_path_dropout": 0.0,
        "residual_response_dropout": 0.0,
    }


def _vision(side: int, patch: int, layers: list[int]) -> dict:
    biased = {f"{name}_bias": True for name in "qkvo"}
    attention = _attention(2, None, 12, LAYER_NORM, **biased)
    return {
        "block_config": _blocks(
            attention, _feed_forward("gelu_pytorch_tanh", 40, False, True), LAYER_NORM
        ),
        "hidden_size": 24,
        "input_size": [side, side],
        "linear_patch_embedding": True,
        "model_type": "jvlm",
        "n_channels": 3,
        "n_layers": 5,
        "output_size": 64,
        "patch_dropout": 0.0,
        "patch_embedding_bias": True,
        "patch_size": patch,
        "positional_interpolation": "bicubic",
        "post_lnorm": True,
        "pre_lnorm": False,
        "use_absolute_positional_embeddings": True,
        "use_cls_token": False,
        "vit_layers": layers,
        "vl_connector_config": {
            "attn_pooling_config": _attention(2, None, 12, LAYER_NORM, **biased),
            "feature_dropout": 0.0,
            "mlp_projector_config": _feed_forward("silu", 72, True, False),
            "padding_embed_type": "pad_and_partial_pad",
            "pooling_h": 2,
            "pooling_type": "attention_meanq",
            "pooling_w": 2,
            "projector_dropout": 0.0,
            "projector_type": "mlp",
            "spatial_merge_size": 2,
        },
    }


def _text(attention: dict) -> dict:
    return {
        "additional_vocab_size": 128,
        "block_config": _blocks(attention, _feed_forward("silu", 96, True, False), RMS),
        "embedding_dropout": 0.0,
        "embedding_size": WORDS,
        "hidden_size": 64,
        "max_position_embeddings": None,
        "max_sequence_length": 40960,
        "model_type": "jvlm",
        "n_layers": 3,
        "normalize_input_embeds": False,
        "num_hidden_layers": 3,
        "partial_rotary_factor": 1.0,
        "rope": True,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "vocab_size": WORDS,
    }


def _case(variant: str, seed: int, text: dict, vision: dict, settings: dict, space: bool) -> Case:
    side, patch = vision["input_size"][0], vision["patch_size"]
    pooled = -(-(side // patch) // 2)
    return Case(
        family="jina_vlm",
        variant=variant,
        model_class="",
        oracle="jina_vlm",
        config={
            "architectures": ["JinaVLMForConditionalGeneration"],
            "bos_token_id": TOKENIZER.ids["<|endoftext|>"],
            "eos_token_id": TOKENIZER.ids["<|endoftext|>"],
            "model_type": "jvlm",
            "pad_token_id": TOKENIZER.ids["<|endoftext|>"],
            "text_config": text,
            "tie_word_embeddings": False,
            "vision_config": vision,
        },
        tokenizer=TOKENIZER,
        chat_template=TEMPLATE,
        files={
            "preprocessor_config.json": {
                "antialias": False,
                "base_input_size": [side, side],
                "cropping_method": "overlap-and-resize",
                "do_convert_rgb": True,
                "do_resize": True,
                "image_max": 1.0,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_min": -1.0,
                "image_processor_type": "JinaVLMImageProcessor",
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "interpolation": "bilinear",
                "max_crops": 6,
                "max_pixels": 40000,
                "min_pixels": 3136,
                "normalization_method": "minmax",
                "overlap_margins": [2, 2],
                "padding_mask": False,
                "padding_value": 0.0,
                "patch_size": patch,
                "pooling_h": 2,
                "pooling_w": 2,
                "preserve_aspect_ratio": False,
                "processor_class": "JinaVLMProcessor",
                "random_interpolation": False,
                "resize_in_float32": False,
                "size": {"longest_edge": 40000, "shortest_edge": 3136},
                "token_length_h": pooled,
                "token_length_w": pooled,
                "tokens_per_image": pooled**2,
                "use_column_tokens": True,
                **settings,
            },
            "processor_config.json": {
                "always_start_with_space": space,
                "processor_class": "JinaVLMProcessor",
            },
        },
        seed=seed,
        large=(200, 120),
        gains=((r"embedding$", 0.6),),
    )


CASES: tuple[Case, ...] = (
    # As published: an odd count of patches in a crop and in the step from one to the next.
    _case(
        "published",
        2,
        _text(_attention(4, 2, 16, RMS, q_lnorm=True, k_lnorm=True, qkv_lnorm_on_heads=True)),
        _vision(98, 14, [-3, -5]),
        {},
        True,
    ),
    # The post norm's features, no norm of queries and keys, other pixels, rows without an end.
    _case(
        "plain",
        3,
        _text(_attention(4, None, 16, RMS)),
        _vision(80, 8, [-1, -4]),
        {
            "antialias": True,
            "image_max": None,
            "image_min": None,
            "interpolation": "bicubic",
            "max_crops": 8,
            "min_pixels": 4096,
            "normalization_method": "gaussian",
            "overlap_margins": [4, 2],
            "resize_in_float32": True,
            "use_column_tokens": False,
        },
        False,
    ),
)
