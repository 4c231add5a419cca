"""Tiny Florence-2 checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import byte_level, files

LOCATIONS = tuple(f"<loc_{index}>" for index in range(1000))
TASKS = (
    "<od>",
    "</od>",
    "<ocr>",
    "</ocr>",
    "<cap>",
    "</cap>",
    "<ncap>",
    "</ncap>",
    "<dcap>",
    "</dcap>",
    "<grounding>",
    "</grounding>",
    "<seg>",
    "</seg>",
    "<sep>",
    "<region_cap>",
    "</region_cap>",
    "<region_to_desciption>",
    "</region_to_desciption>",
    "<proposal>",
    "</proposal>",
    "<poly>",
    "</poly>",
    "<and>",
)
FIRST = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# The published ids start with <s> 0, <pad> 1, </s> 2, <unk> 3.
TOKENIZER = files(
    byte_level((*FIRST, *LOCATIONS, *TASKS, "<image>"), bos="<s>", suffix="</s>", first=True),
    bos="<s>",
    eos="</s>",
    pad="<pad>",
    unk="<unk>",
    extra={"extra_special_tokens": {"image_token": "<image>"}, "image_token": "<image>"},
)


def _florence2() -> tuple[Case, Case]:
    class_name = "Florence2ForConditionalGeneration"
    ids = TOKENIZER.ids

    def config(text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": [class_name],
            "bos_token_id": 0,
            "eos_token_id": 2,
            "image_token_id": ids["<image>"],
            "is_encoder_decoder": True,
            "model_type": "florence2",
            "pad_token_id": 1,
            "text_config": {
                "model_type": "bart",
                "activation_function": "gelu",
                "bos_token_id": 0,
                "d_model": 40,
                "decoder_attention_heads": 4,
                "decoder_ffn_dim": 64,
                "decoder_layers": 2,
                "decoder_start_token_id": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 64,
                "encoder_layers": 2,
                "eos_token_id": 2,
                "forced_bos_token_id": 0,
                "forced_eos_token_id": 2,
                "max_position_embeddings": 1024,
                "pad_token_id": 1,
                "scale_embedding": False,
                "vocab_size": TOKENIZER.size + 3,
                **text,
            },
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "vision_config": {
                "model_type": "florence_vision",
                "activation_function": "gelu",
                "depths": [1, 1, 2, 1],
                "embed_dim": [16, 24, 32, 40],
                "in_channels": 3,
                "max_position_embeddings": 50,
                "max_temporal_embeddings": 100,
                "mlp_ratio": 2.0,
                "num_groups": [2, 2, 4, 4],
                "num_heads": [2, 2, 4, 4],
                "patch_padding": [3, 1, 1, 1],
                "patch_prenorm": [False, True, True, True],
                "patch_size": [7, 3, 3, 3],
                "patch_stride": [4, 2, 2, 2],
                "projection_dim": text.get("d_model", 40),
                "qkv_bias": True,
                "window_size": 6,
                **vision,
            },
        }

    def case(variant: str, size: int, tokens: int, **settings: Any) -> Case:
        return Case(
            family="florence2",
            variant=variant,
            model_class=class_name,
            tokenizer=TOKENIZER,
            files={
                "preprocessor_config.json": {
                    "crop_size": {"height": size, "width": size},
                    "do_center_crop": False,
                    "do_convert_rgb": None,
                    "do_normalize": True,
                    "do_rescale": True,
                    "do_resize": True,
                    "image_mean": [0.485, 0.456, 0.406],
                    "image_processor_type": "CLIPImageProcessor",
                    "image_seq_length": tokens,
                    "image_std": [0.229, 0.224, 0.225],
                    "processor_class": "Florence2Processor",
                    "resample": 3,
                    "rescale_factor": 0.00392156862745098,
                    "size": {"height": size, "width": size},
                },
            },
            generation={
                "bos_token_id": 0,
                "decoder_start_token_id": 2,
                "eos_token_id": 2,
                "forced_bos_token_id": 0,
                "pad_token_id": 1,
            },
            gains=((r"shared|embed_tokens", 0.4),),
            images=1,
            two_turns=False,
            **settings,
        )

    large = {
        "d_model": 48,
        "encoder_layers": 3,
        "decoder_attention_heads": 3,
        "encoder_attention_heads": 3,
        "scale_embedding": True,
    }
    return (
        case("base", 96, 10, config=config({}, {})),
        case(
            "large",
            128,
            17,
            config=config(large, {"depths": [1, 1, 1, 1], "qkv_bias": False, "window_size": 5}),
            manner="saved",
        ),
    )


CASES: tuple[Case, ...] = _florence2()
