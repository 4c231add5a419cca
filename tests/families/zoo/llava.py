"""Tiny LLaVA checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import files, sentencepiece_like
from . import templates
from .qwen import CLIP_MEAN, CLIP_STD

TOKENIZER = files(
    sentencepiece_like(special=("<image>", "<pad>")),
    bos="<s>",
    eos="</s>",
    pad="<pad>",
    unk="<unk>",
    extra={"extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>"},
)
IDS = TOKENIZER.ids


def clip_preprocessor(kind: str, size: int, **extra: Any) -> dict[str, Any]:
    """A preprocessor_config.json in the manner of CLIP's."""
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": kind,
        "image_std": CLIP_STD,
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": size},
        **extra,
    }


def clip_vision(**changes: Any) -> dict[str, Any]:
    """A CLIP tower's vision_config."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "image_size": 42,
        "intermediate_size": 60,
        "num_attention_heads": 2,
        "num_hidden_layers": 4,
        "patch_size": 14,
        "projection_dim": 24,
        "vocab_size": 32000,
        **changes,
    }


def llama_text(**changes: Any) -> dict[str, Any]:
    """A Llama text_config as LLaVA's checkpoints give it: only what differs from the defaults."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": TOKENIZER.size + 6,
        "hidden_size": 48,
        "intermediate_size": 84,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        **changes,
    }


NEW_NAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)

GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": IDS["<pad>"]}


def _llava() -> tuple[Case, Case]:
    clip = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": IDS["<image>"],
        "image_seq_length": 9,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": llama_text(),
        "vision_config": clip_vision(),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }
    siglip = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "dtype": "float32",
        "image_token_index": IDS["<image>"],
        "image_seq_length": 16,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": False,
        "tie_word_embeddings": True,
        "text_config": llama_text(
            model_type="qwen2",
            architectures=["Qwen2ForCausalLM"],
            hidden_size=40,
            num_attention_heads=5,
            num_key_value_heads=1,
            rope_theta=1000000.0,
            tie_word_embeddings=True,
        ),
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 36,
            "image_size": 40,
            "intermediate_size": 50,
            "num_attention_heads": 3,
            "num_hidden_layers": 3,
            "patch_size": 10,
            "vision_use_head": False,
        },
        "vision_feature_layer": [-2, 1],
        "vision_feature_select_strategy": "full",
    }
    class_name = "LlavaForConditionalGeneration"
    return (
        Case(
            "llava",
            "clip_default",
            class_name,
            clip,
            TOKENIZER,
            templates.LLAVA,
            "chat_template.json",
            {
                "preprocessor_config.json": clip_preprocessor("CLIPImageProcessor", 42),
                "processor_config.json": {
                    "image_token": "<image>",
                    "num_additional_image_tokens": 1,
                    "patch_size": 14,
                    "processor_class": "LlavaProcessor",
                    "vision_feature_select_strategy": "default",
                },
            },
            GENERATION,
            rename=(
                (r"^model\.language_model\.", "language_model.model."),
                (r"^lm_head\.", "language_model.lm_head."),
                (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
                (r"^vision_tower\.", "vision_tower.vision_model."),
            ),
        ),
        Case(
            "llava",
            "siglip_full_tied",
            class_name,
            siglip,
            TOKENIZER,
            templates.LLAVA,
            files={
                "preprocessor_config.json": {
                    "do_convert_rgb": None,
                    "do_normalize": True,
                    "do_rescale": True,
                    "do_resize": True,
                    "image_mean": [0.5, 0.5, 0.5],
                    "image_std": [0.5, 0.5, 0.5],
                    "image_processor_type": "SiglipImageProcessor",
                    "processor_class": "LlavaProcessor",
                    "resample": 2,
                    "rescale_factor": 0.00392156862745098,
                    "size": {"height": 40, "width": 40},
                },
                "processor_config.json": {
                    "image_token": "<image>",
                    "num_additional_image_tokens": 0,
                    "patch_size": 10,
                    "processor_class": "LlavaProcessor",
                    "vision_feature_select_strategy": "full",
                },
            },
            generation=GENERATION,
            manner="saved",
            rename=NEW_NAMES,
        ),
    )


CASES: tuple[Case, ...] = _llava()
