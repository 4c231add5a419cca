"""Tiny ERNIE 4.5 VL checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import files, sentencepiece_like
from . import templates
from .qwen import CLIP_MEAN, CLIP_STD

NAMED = {
    "image_token": "<|IMAGE_PLACEHOLDER|>",
    "image_start_token": "<|IMAGE_START|>",
    "image_end_token": "<|IMAGE_END|>",
    "video_token": "<|VIDEO_PLACEHOLDER|>",
    "video_start_token": "<|VIDEO_START|>",
    "video_end_token": "<|VIDEO_END|>",
}
TOKENIZER = files(
    sentencepiece_like(
        ("<unk>", "<s>", "</s>"),
        ("<|begin_of_sentence|>", "<|end_of_sentence|>", *NAMED.values()),
        bos=None,
        prefix_space=False,
    ),
    bos="<s>",
    eos="</s>",
    pad="<unk>",
    unk="<unk>",
    extra={"extra_special_tokens": NAMED, **NAMED},
)


def _ernie() -> tuple[Case, Case]:
    class_name = "Ernie4_5_VLMoeForConditionalGeneration"
    ids = TOKENIZER.ids

    def config(tied: bool, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
        body = {
            "model_type": "ernie4_5_vl_moe_text",
            "hidden_act": "silu",
            "hidden_size": 48,
            "intermediate_size": 84,
            "max_position_embeddings": 131072,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "moe_intermediate_size": [24, 12],
            "moe_k": 2,
            "moe_norm_min": 1e-12,
            "moe_num_experts": 5,
            "moe_num_shared_experts": 2,
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "mrope_section": [2, 2, 2],
                "rope_theta": 500000.0,
                "rope_type": "default",
            },
            "tie_word_embeddings": tied,
            "use_bias": False,
            "vocab_size": TOKENIZER.size + 3,
            **text,
        }
        return {
            "architectures": [class_name],
            "image_end_token_id": ids["<|IMAGE_END|>"],
            "image_start_token_id": ids["<|IMAGE_START|>"],
            "image_token_id": ids["<|IMAGE_PLACEHOLDER|>"],
            "model_type": "ernie4_5_vl_moe",
            "text_config": body,
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
            "video_end_token_id": ids["<|VIDEO_END|>"],
            "video_start_token_id": ids["<|VIDEO_START|>"],
            "video_token_id": ids["<|VIDEO_PLACEHOLDER|>"],
            "vision_config": {
                "model_type": "ernie4_5_vl_moe_vision",
                "depth": 2,
                "hidden_act": "quick_gelu",
                "hidden_size": 32,
                "in_channels": 3,
                "intermediate_size": 64,
                "num_heads": 2,
                "patch_size": 14,
                "rms_norm_eps": 1e-6,
                "spatial_merge_size": 2,
                "temporal_merge_size": 2,
                **vision,
            },
        }

    def case(variant: str, patch: int, **settings: Any) -> Case:
        return Case(
            family="ernie4_5_vl_moe",
            variant=variant,
            model_class=class_name,
            tokenizer=TOKENIZER,
            chat_template=templates.ERNIE,
            files={
                "preprocessor_config.json": {
                    "do_convert_rgb": True,
                    "do_normalize": True,
                    "do_rescale": True,
                    "do_resize": True,
                    "image_mean": CLIP_MEAN,
                    "image_processor_type": "Ernie4_5_VLMoeImageProcessor",
                    "image_std": CLIP_STD,
                    "merge_size": 2,
                    "patch_size": patch,
                    "processor_class": "Ernie4_5_VLMoeProcessor",
                    "resample": 3,
                    "rescale_factor": 0.00392156862745098,
                    "size": {"longest_edge": 12544, "shortest_edge": 3136},
                },
            },
            generation={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            gains=((r"e_score_correction_bias", 0.3), (r"gate\.weight", 2.0)),
            **settings,
        )

    wide = {
        "hidden_size": 40,
        "moe_k": 3,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "mrope_section": [3, 3, 4],
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "use_bias": True,
    }
    return (
        case("tied", 14, config=config(True, {}, {})),
        case(
            "untied_bias",
            10,
            config=config(False, wide, {"depth": 3, "patch_size": 10}),
            manner="saved",
        ),
    )


CASES: tuple[Case, ...] = _ernie()
