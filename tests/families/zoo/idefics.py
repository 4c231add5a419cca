"""Tiny Idefics3 and SmolVLM checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import TokenizerFiles, byte_level, files
from . import templates

TILES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
MEDIA = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *TILES)


def _idefics3_tokenizer() -> TokenizerFiles:
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *MEDIA)
    tokenizer = byte_level(special, bos="<|begin_of_text|>")
    return files(
        tokenizer, bos="<|begin_of_text|>", eos="<end_of_utterance>", pad="<|end_of_text|>"
    )


def _smolvlm_tokenizer() -> TokenizerFiles:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *MEDIA)
    tokenizer = byte_level(special, first=True)
    return files(
        tokenizer,
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        unk="<|endoftext|>",
        extra={
            "extra_special_tokens": {
                "end_of_utterance_token": "<end_of_utterance>",
                "fake_image_token": "<fake_token_around_image>",
                "global_image_token": "<global-img>",
                "image_token": "<image>",
            }
        },
    )


LLAMA3 = _idefics3_tokenizer()
SMOL = _smolvlm_tokenizer()


def _preprocessor(kind: str, tile: int, edge: int, *, split: bool) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_image_splitting": split,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": kind,
        "image_std": [0.5, 0.5, 0.5],
        "max_image_size": {"longest_edge": tile},
        "processor_class": "Idefics3Processor",
        "resample": 1,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": edge},
    }


def _text(tokenizer: TokenizerFiles, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.size,
        "hidden_size": 48,
        "intermediate_size": 92,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        **changes,
    }


def _vision(model_type: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 60,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 8,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "size": {"longest_edge": 48},
        "max_image_size": {"longest_edge": 48},
        "use_base_siglip": True,
        **changes,
    }


def _generation(tokenizer: TokenizerFiles, bos: str) -> dict[str, Any]:
    ids = tokenizer.ids
    return {
        "bos_token_id": ids[bos],
        "eos_token_id": ids["<end_of_utterance>"],
        "pad_token_id": 2,
    }


def _idefics3() -> tuple[Case, Case]:
    llama3 = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": LLAMA3.ids["<image>"],
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "text_config": _text(
            LLAMA3,
            rope_theta=500000.0,
            rope_scaling={
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
        ),
        "vision_config": _vision("idefics3_vision"),
    }
    smol = {
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "image_token_id": SMOL.ids["<image>"],
        "scale_factor": 3,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "text_config": _text(
            SMOL,
            tie_word_embeddings=True,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
        ),
        "vision_config": _vision("idefics3", image_size=36, patch_size=6, num_hidden_layers=3),
    }
    class_name = "Idefics3ForConditionalGeneration"
    return (
        Case(
            "idefics3",
            "llama3_split",
            class_name,
            llama3,
            LLAMA3,
            templates.IDEFICS3,
            "chat_template.json",
            {
                "preprocessor_config.json": _preprocessor(
                    "Idefics3ImageProcessor", 48, 144, split=True
                ),
                "processor_config.json": {
                    "processor_class": "Idefics3Processor",
                    "image_seq_len": 9,
                },
            },
            _generation(LLAMA3, "<|begin_of_text|>"),
        ),
        Case(
            "idefics3",
            "smol_tied_whole",
            class_name,
            smol,
            SMOL,
            templates.SMOLVLM,
            "chat_template.json",
            {
                "preprocessor_config.json": _preprocessor(
                    "Idefics3ImageProcessor", 36, 72, split=False
                ),
                "processor_config.json": {
                    "processor_class": "Idefics3Processor",
                    "image_seq_len": 4,
                },
            },
            _generation(SMOL, "<|im_start|>"),
        ),
    )


def _smolvlm() -> tuple[Case, Case]:
    published = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": SMOL.ids["<image>"],
        "scale_factor": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": _text(SMOL, tie_word_embeddings=False),
        "vision_config": _vision("smolvlm_vision"),
    }
    saved = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "dtype": "float32",
        "image_token_id": SMOL.ids["<image>"],
        "scale_factor": 4,
        "tie_word_embeddings": True,
        "text_config": _text(
            SMOL,
            vocab_size=SMOL.size + 5,
            tie_word_embeddings=True,
            hidden_size=40,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=8,
        ),
        "vision_config": _vision(
            "smolvlm_vision", hidden_size=48, num_attention_heads=3, image_size=64
        ),
    }
    class_name = "SmolVLMForConditionalGeneration"
    video = {
        "fps": 1,
        "max_frames": 8,
        "video_size": {"longest_edge": 48},
    }
    first = _preprocessor("SmolVLMImageProcessor", 48, 96, split=True)
    second = _preprocessor("SmolVLMImageProcessor", 64, 256, split=True)
    return (
        Case(
            "smolvlm",
            "published_untied",
            class_name,
            published,
            SMOL,
            templates.SMOLVLM,
            files={
                "preprocessor_config.json": {
                    **first,
                    "processor_class": "SmolVLMProcessor",
                    "video_sampling": video,
                },
                "processor_config.json": {
                    "processor_class": "SmolVLMProcessor",
                    "image_seq_len": 9,
                },
            },
            generation=_generation(SMOL, "<|im_start|>"),
        ),
        Case(
            "smolvlm",
            "saved_tied",
            class_name,
            saved,
            SMOL,
            templates.SMOLVLM,
            files={
                "processor_config.json": {
                    "image_processor": {
                        **second,
                        "image_processor_type": "SmolVLMImageProcessorFast",
                    },
                    "processor_class": "SmolVLMProcessor",
                    "image_seq_len": 4,
                },
            },
            generation=_generation(SMOL, "<|im_start|>"),
            manner="saved",
        ),
    )


CASES: tuple[Case, ...] = (*_idefics3(), *_smolvlm())
