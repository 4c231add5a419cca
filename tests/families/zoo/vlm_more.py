"""Tiny LLaVA-NeXT, Pixtral, Mistral 3, Idefics2 and InternVL checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import QWEN_SPLIT, TokenizerFiles, byte_level, files, sentencepiece_like
from . import templates
from .llava import GENERATION as LLAVA_GENERATION
from .llava import NEW_NAMES, clip_preprocessor, clip_vision, llama_text
from .llava import TOKENIZER as VICUNA
from .qwen import CLIP_MEAN, CLIP_STD

LLAVA_OLD_NAMES = (
    (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.", ""),
)


def _llava_next() -> tuple[Case, Case]:
    class_name = "LlavaNextForConditionalGeneration"
    mistral = {
        "architectures": [class_name],
        "model_type": "llava_next",
        "ignore_index": -100,
        "image_grid_pinpoints": [[42, 84], [84, 42], [84, 84], [126, 42], [42, 126]],
        "image_seq_length": 9,
        "image_token_index": VICUNA.ids["<image>"],
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_image_newline_parameter": True,
        "text_config": {
            **llama_text(model_type="mistral", architectures=["MistralForCausalLM"]),
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
        "vision_config": clip_vision(),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    vicuna = {
        **mistral,
        "image_grid_pinpoints": [[60, 30], [30, 60], [60, 60]],
        "text_config": llama_text(hidden_size=40, num_attention_heads=2, num_key_value_heads=2),
        "vision_config": clip_vision(image_size=30, patch_size=10, num_hidden_layers=3),
        "vision_feature_layer": [-3, -1],
    }

    def preprocessor(size: int, pinpoints: list[list[int]]) -> dict[str, Any]:
        return clip_preprocessor(
            "LlavaNextImageProcessor",
            size,
            aspect_ratio_setting="anyres",
            do_pad=True,
            image_grid_pinpoints=pinpoints,
            processor_class="LlavaNextProcessor",
        )

    def processor(patch: int, extra: int, strategy: str) -> dict[str, Any]:
        return {
            "image_token": "<image>",
            "num_additional_image_tokens": extra,
            "patch_size": patch,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": strategy,
        }

    return (
        Case(
            "llava_next",
            "mistral_default",
            class_name,
            mistral,
            VICUNA,
            templates.LLAVA_MISTRAL,
            "chat_template.json",
            {
                "preprocessor_config.json": preprocessor(42, mistral["image_grid_pinpoints"]),
                "processor_config.json": processor(14, 1, "default"),
            },
            LLAVA_GENERATION,
            rename=LLAVA_OLD_NAMES,
        ),
        Case(
            "llava_next",
            "vicuna_two_layers",
            class_name,
            vicuna,
            VICUNA,
            templates.LLAVA,
            files={
                "preprocessor_config.json": preprocessor(30, vicuna["image_grid_pinpoints"]),
                "processor_config.json": processor(10, 1, "default"),
            },
            generation=LLAVA_GENERATION,
            manner="saved",
            rename=(*NEW_NAMES, (r"^image_newline", "model.image_newline")),
        ),
    )


TEKKEN_SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[AUDIO]",
    "[BEGIN_AUDIO]",
    "[TRANSCRIBE]",
)


def tekken_tokenizer() -> TokenizerFiles:
    """Mistral's byte-level tokenizer as a tokenizer.json: control tokens have the lowest ids."""
    tokenizer = byte_level(TEKKEN_SPECIAL, bos="<s>", first=True)
    return files(tokenizer, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")


TEKKEN = tekken_tokenizer()
MISTRAL_GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11}


def mistral_text(**changes: Any) -> dict[str, Any]:
    """A Mistral text_config."""
    return {
        "model_type": "mistral",
        "vocab_size": TEKKEN.size + 4,
        "attention_dropout": 0.0,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 40,
        "intermediate_size": 76,
        "max_position_embeddings": 131072,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        **changes,
    }


def pixtral_vision(**changes: Any) -> dict[str, Any]:
    """A Pixtral tower's vision_config."""
    return {
        "model_type": "pixtral",
        "attention_dropout": 0.0,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 32,
        "image_size": 112,
        "intermediate_size": 56,
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "rope_theta": 10000.0,
        **changes,
    }


def pixtral_preprocessor(edge: int, patch: int, **extra: Any) -> dict[str, Any]:
    """A preprocessor_config.json in the manner of Pixtral's."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "PixtralImageProcessor",
        "image_std": CLIP_STD,
        "patch_size": {"height": patch, "width": patch},
        "processor_class": "PixtralProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": edge},
        **extra,
    }


def _pixtral_processor(patch: int, merge: int | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
        "image_token": "[IMG]",
        "patch_size": patch,
        "processor_class": "PixtralProcessor",
    }
    if merge is not None:
        config["spatial_merge_size"] = merge
    return config


def _mistral3() -> tuple[Case, Case]:
    class_name = "Mistral3ForConditionalGeneration"
    base = {
        "architectures": [class_name],
        "model_type": "mistral3",
        "image_token_index": 10,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "torch_dtype": "float32",
        "vision_feature_layer": -1,
    }
    untied = {
        **base,
        "tie_word_embeddings": False,
        "text_config": mistral_text(tie_word_embeddings=False),
        "vision_config": pixtral_vision(),
    }
    tied = {
        **base,
        "tie_word_embeddings": True,
        "multimodal_projector_bias": True,
        "text_config": mistral_text(
            tie_word_embeddings=True,
            hidden_size=48,
            head_dim=12,
            num_attention_heads=6,
            num_key_value_heads=1,
            rope_theta=100000.0,
        ),
        "vision_config": pixtral_vision(
            hidden_size=48, head_dim=12, num_attention_heads=4, patch_size=8, image_size=96
        ),
    }
    return (
        Case(
            "mistral3",
            "untied",
            class_name,
            untied,
            TEKKEN,
            templates.MISTRAL_SMALL,
            files={
                "preprocessor_config.json": pixtral_preprocessor(112, 14),
                "processor_config.json": _pixtral_processor(14, 2),
            },
            generation=MISTRAL_GENERATION,
        ),
        Case(
            "mistral3",
            "tied_projector_bias",
            class_name,
            tied,
            TEKKEN,
            templates.MISTRAL_SMALL,
            "chat_template.json",
            {
                "preprocessor_config.json": pixtral_preprocessor(96, 8),
                "processor_config.json": _pixtral_processor(8, 2),
            },
            MISTRAL_GENERATION,
            manner="saved",
            rename=NEW_NAMES,
        ),
    )


def _pixtral() -> tuple[Case, Case]:
    class_name = "LlavaForConditionalGeneration"
    published = {
        "architectures": [class_name],
        "model_type": "llava",
        "ignore_index": -100,
        "image_seq_length": 1,
        "image_token_index": 10,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "text_config": mistral_text(rope_theta=1000000000.0),
        "torch_dtype": "float32",
        "vision_config": pixtral_vision(),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    saved = {
        **published,
        "text_config": mistral_text(num_key_value_heads=4, head_dim=10, rope_theta=10000.0),
        "vision_config": pixtral_vision(patch_size=10, num_hidden_layers=3),
        "vision_feature_layer": -2,
    }
    return (
        Case(
            "pixtral",
            "published",
            class_name,
            published,
            TEKKEN,
            templates.PIXTRAL,
            "tokenizer_config.json",
            {
                "preprocessor_config.json": pixtral_preprocessor(112, 14),
                "processor_config.json": _pixtral_processor(14, None),
            },
            MISTRAL_GENERATION,
        ),
        Case(
            "pixtral",
            "inner_layer",
            class_name,
            saved,
            TEKKEN,
            templates.PIXTRAL,
            files={
                "preprocessor_config.json": pixtral_preprocessor(80, 10),
                "processor_config.json": _pixtral_processor(10, None),
            },
            generation=MISTRAL_GENERATION,
            manner="saved",
        ),
    )


IDEFICS2_TOKENIZER = files(
    sentencepiece_like(special=("<fake_token_around_image>", "<image>", "<end_of_utterance>")),
    bos="<s>",
    eos="</s>",
    pad="<unk>",
    unk="<unk>",
)


def _idefics2() -> tuple[Case, Case]:
    class_name = "Idefics2ForConditionalGeneration"
    ids = IDEFICS2_TOKENIZER.ids
    base = {
        "architectures": [class_name],
        "model_type": "idefics2",
        "image_token_id": ids["<image>"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
    }

    def vision(**changes: Any) -> dict[str, Any]:
        return {
            "model_type": "idefics2",
            "hidden_size": 32,
            "image_size": 70,
            "intermediate_size": 60,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 14,
            **changes,
        }

    def text(**changes: Any) -> dict[str, Any]:
        vocabulary = {"vocab_size": IDEFICS2_TOKENIZER.size, "sliding_window": 4096}
        return mistral_text(**{**vocabulary, "rope_theta": 10000.0, **changes})

    whole = {
        **base,
        "text_config": text(),
        "vision_config": vision(),
        "perceiver_config": {
            "model_type": "idefics2",
            "resampler_n_latents": 6,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 10,
            "num_key_value_heads": 2,
            "hidden_size": 40,
            "rms_norm_eps": 1e-5,
        },
    }
    split = {
        **base,
        "text_config": text(hidden_size=48, num_key_value_heads=1, sliding_window=None),
        "vision_config": vision(hidden_size=48, num_attention_heads=3, image_size=56),
        "perceiver_config": {
            "hidden_size": 48,
            "rms_norm_eps": 1e-5,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 3,
            "resampler_head_dim": 16,
            "num_key_value_heads": 1,
        },
    }

    def preprocessor(*, split_image: bool, shortest: int, longest: int) -> dict[str, Any]:
        return {
            "do_convert_rgb": True,
            "do_image_splitting": split_image,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Idefics2ImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Idefics2Processor",
            "resample": 2,
            "rescale_factor": 0.00392156862745098,
            "size": {"longest_edge": longest, "shortest_edge": shortest},
        }

    generation = {"bos_token_id": 1, "eos_token_id": [2, ids["<end_of_utterance>"]]}
    return (
        Case(
            "idefics2",
            "whole",
            class_name,
            whole,
            IDEFICS2_TOKENIZER,
            templates.IDEFICS2,
            "chat_template.json",
            {
                "preprocessor_config.json": preprocessor(
                    split_image=False, shortest=28, longest=70
                ),
                "processor_config.json": {
                    "processor_class": "Idefics2Processor",
                    "image_seq_len": 6,
                },
            },
            generation,
        ),
        Case(
            "idefics2",
            "split",
            class_name,
            split,
            IDEFICS2_TOKENIZER,
            templates.IDEFICS2,
            files={
                "preprocessor_config.json": preprocessor(split_image=True, shortest=30, longest=56),
                "processor_config.json": {
                    "processor_class": "Idefics2Processor",
                    "image_seq_len": 4,
                },
            },
            generation=generation,
            manner="saved",
        ),
    )


INTERNVL_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<video>",
)
INTERNVL_TOKENIZER = files(
    byte_level(INTERNVL_SPECIAL, split=QWEN_SPLIT),
    eos="<|im_end|>",
    pad="<|endoftext|>",
    extra={
        "extra_special_tokens": {
            "context_image_token": "<IMG_CONTEXT>",
            "end_image_token": "</img>",
            "start_image_token": "<img>",
            "video_token": "<video>",
        },
        "context_image_token": "<IMG_CONTEXT>",
        "end_image_token": "</img>",
        "start_image_token": "<img>",
        "video_token": "<video>",
    },
)


def _internvl() -> tuple[Case, Case]:
    class_name = "InternVLForConditionalGeneration"
    ids = INTERNVL_TOKENIZER.ids

    def vision(**changes: Any) -> dict[str, Any]:
        return {
            "model_type": "internvl_vision",
            "architectures": ["InternVisionModel"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": 32,
            "image_size": [48, 48],
            "intermediate_size": 64,
            "layer_norm_eps": 1e-6,
            "layer_scale_init_value": 0.1,
            "norm_type": "layer_norm",
            "num_attention_heads": 2,
            "num_channels": 3,
            "num_hidden_layers": 2,
            "patch_size": [12, 12],
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
            **changes,
        }

    def text(model_type: str, **changes: Any) -> dict[str, Any]:
        return {
            "model_type": model_type,
            "vocab_size": INTERNVL_TOKENIZER.size + 5,
            "hidden_act": "silu",
            "hidden_size": 48,
            "intermediate_size": 80,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            **changes,
        }

    base = {
        "architectures": [class_name],
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_token_id": ids["<IMG_CONTEXT>"],
        "projector_hidden_act": "gelu",
        "torch_dtype": "float32",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    small = {
        **base,
        "image_seq_length": 4,
        "tie_word_embeddings": False,
        "text_config": text(
            "qwen2", rope_scaling={"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
        ),
        "vision_config": vision(),
    }
    large = {
        **base,
        "image_seq_length": 9,
        "tie_word_embeddings": True,
        "text_config": text("qwen3", head_dim=16, num_key_value_heads=1, tie_word_embeddings=True),
        "vision_config": vision(
            attention_bias=False,
            norm_type="rms_norm",
            use_qk_norm=True,
            hidden_size=48,
            num_attention_heads=3,
            image_size=[60, 60],
            patch_size=[10, 10],
            num_hidden_layers=3,
        ),
    }

    def preprocessor(size: int, most: int) -> dict[str, Any]:
        return {
            "crop_size": None,
            "crop_to_patches": False,
            "data_format": "channels_first",
            "do_center_crop": None,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "image_std": [0.229, 0.224, 0.225],
            "max_patches": most,
            "min_patches": 1,
            "processor_class": "InternVLProcessor",
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": size, "width": size},
        }

    generation = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    return (
        Case(
            "internvl",
            "small",
            class_name,
            small,
            INTERNVL_TOKENIZER,
            templates.INTERNVL,
            files={
                "preprocessor_config.json": preprocessor(48, 12),
                "processor_config.json": {
                    "image_seq_length": 4,
                    "processor_class": "InternVLProcessor",
                },
            },
            generation=generation,
        ),
        Case(
            "internvl",
            "large_tied",
            class_name,
            large,
            INTERNVL_TOKENIZER,
            templates.INTERNVL,
            "chat_template.json",
            {
                "preprocessor_config.json": preprocessor(60, 4),
                "processor_config.json": {
                    "image_seq_length": 9,
                    "processor_class": "InternVLProcessor",
                },
            },
            generation,
            manner="saved",
            rename=NEW_NAMES,
        ),
    )


CASES: tuple[Case, ...] = (
    *_internvl(),
    *_mistral3(),
    *_pixtral(),
    *_llava_next(),
    *_idefics2(),
)
