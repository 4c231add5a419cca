"""Tiny DeepSeek-VL, Janus and DeepSeek-OCR-2 checkpoints."""

from __future__ import annotations

from typing import Any

from ..checkpoints import Case
from ..tiny_tokenizer import TokenizerFiles, byte_level, files
from . import templates
from .qwen import CLIP_MEAN, CLIP_STD

BAR = "\uff5c"  # the full-width bar in these families' control tokens
BOS = f"<{BAR}begin▁of▁sentence{BAR}>"
EOS = f"<{BAR}end▁of▁sentence{BAR}>"
PAD = f"<{BAR}▁pad▁{BAR}>"


def _tokenizer(*media: str, named: dict[str, str]) -> TokenizerFiles:
    tokenizer = byte_level((BOS, EOS, PAD, *media), bos=BOS)
    return files(
        tokenizer,
        bos=BOS,
        eos=EOS,
        pad=PAD,
        extra={"extra_special_tokens": named, **named},
    )


DEEPSEEK_VL = _tokenizer("<image_placeholder>", named={"image_token": "<image_placeholder>"})
JANUS = _tokenizer(
    "<image_placeholder>",
    "<begin_of_image>",
    "<end_of_image>",
    "<|User|>",
    "<|Assistant|>",
    named={
        "image_token": "<image_placeholder>",
        "boi_token": "<begin_of_image>",
        "eoi_token": "<end_of_image>",
    },
)


def _text(tokenizer: TokenizerFiles, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 84,
        "max_position_embeddings": 16384,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "float32",
        "vocab_size": tokenizer.size + 3,
        **changes,
    }


def _siglip(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "image_size": 48,
        "intermediate_size": 60,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 12,
        "vision_use_head": False,
        **changes,
    }


def _preprocessor(kind: str, size: int, **extra: Any) -> dict[str, Any]:
    return {
        "background_color": [122, 116, 104],
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": kind,
        "image_std": CLIP_STD,
        "min_size": 14,
        "processor_class": kind.replace("Image", ""),
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": size, "width": size},
        **extra,
    }


GENERATION = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def _deepseek_vl() -> tuple[Case, Case]:
    class_name = "DeepseekVLForConditionalGeneration"
    ids = DEEPSEEK_VL.ids

    def config(tied: bool, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": [class_name],
            "image_token_id": ids["<image_placeholder>"],
            "model_type": "deepseek_vl",
            "text_config": _text(DEEPSEEK_VL, tie_word_embeddings=tied, **text),
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
            "vision_config": _siglip(**vision),
        }

    def case(variant: str, tokens: int, **settings: Any) -> Case:
        size = settings["config"]["vision_config"]["image_size"]
        return Case(
            family="deepseek_vl",
            variant=variant,
            model_class=class_name,
            tokenizer=DEEPSEEK_VL,
            chat_template=templates.DEEPSEEK_VL,
            files={
                "preprocessor_config.json": _preprocessor("DeepseekVLImageProcessor", size),
                "processor_config.json": {
                    "num_image_tokens": tokens,
                    "processor_class": "DeepseekVLProcessor",
                },
            },
            generation=GENERATION,
            **settings,
        )

    narrow = {"image_size": 60, "patch_size": 10, "num_hidden_layers": 3}
    return (
        case("untied", 16, config=config(False, {}, {})),
        case(
            "tied",
            36,
            config=config(True, {"num_key_value_heads": 2, "hidden_size": 40}, narrow),
            manner="saved",
        ),
    )


def _deepseek_vl_hybrid() -> tuple[Case, Case]:
    class_name = "DeepseekVLHybridForConditionalGeneration"
    ids = DEEPSEEK_VL.ids

    def config(tied: bool, text: dict[str, Any], sam: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": [class_name],
            "high_res_vision_config": {
                "model_type": "sam_vision_model",
                "global_attn_indexes": [1, 2],
                "hidden_size": 24,
                "image_size": 96,
                "mlp_ratio": 2.0,
                "num_attention_heads": 2,
                "num_hidden_layers": 3,
                "output_channels": 12,
                "patch_size": 8,
                "window_size": 5,
                **sam,
            },
            "image_token_id": ids["<image_placeholder>"],
            "model_type": "deepseek_vl_hybrid",
            "text_config": _text(DEEPSEEK_VL, tie_word_embeddings=tied, **text),
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
            "vision_config": _siglip(),
        }

    def case(variant: str, high: int, **settings: Any) -> Case:
        return Case(
            family="deepseek_vl_hybrid",
            variant=variant,
            model_class=class_name,
            tokenizer=DEEPSEEK_VL,
            chat_template=templates.DEEPSEEK_VL,
            files={
                "preprocessor_config.json": _preprocessor(
                    "DeepseekVLHybridImageProcessor",
                    48,
                    high_res_image_mean=CLIP_MEAN,
                    high_res_image_std=CLIP_STD,
                    high_res_resample=3,
                    high_res_size={"height": high, "width": high},
                ),
                "processor_config.json": {
                    "num_image_tokens": 16,
                    "processor_class": "DeepseekVLHybridProcessor",
                },
            },
            generation=GENERATION,
            gains=((r"alpha", 10.0),),
            **settings,
        )

    other = {"image_size": 80, "patch_size": 8, "global_attn_indexes": [2], "window_size": 4}
    return (
        case("untied", 96, config=config(False, {}, {})),
        case(
            "tied",
            80,
            config=config(True, {"hidden_size": 40, "num_key_value_heads": 2}, other),
            manner="saved",
        ),
    )


def _janus() -> tuple[Case, Case]:
    class_name = "JanusForConditionalGeneration"
    ids = JANUS.ids

    def config(tied: bool, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
        body = _text(JANUS, tie_word_embeddings=tied, **text)
        width = body["hidden_size"]
        return {
            "architectures": [class_name],
            "image_token_id": ids["<image_placeholder>"],
            "model_type": "janus",
            "text_config": body,
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
            "vision_config": {
                "model_type": "janus_vision_model",
                "attention_bias": True,
                "depth": 2,
                "hidden_act": "gelu",
                "hidden_size": 32,
                "image_size": 48,
                "layer_norm_eps": 1e-6,
                "mlp_ratio": 2.0,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "num_image_tokens": 16,
                "patch_size": 12,
                "projection_dim": width,
                "use_qk_norm": False,
                **vision,
            },
            "vq_config": {
                "model_type": "janus_vqgan",
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "embed_dim": 4,
                "image_token_embed_dim": width,
                "latent_channels": 32,
                "num_embeddings": 16,
                "num_hidden_layers": 2,
                "num_patches": 4,
                "num_res_blocks": 1,
                "projection_dim": width,
            },
        }

    def case(variant: str, tokens: int, **settings: Any) -> Case:
        size = settings["config"]["vision_config"]["image_size"]
        return Case(
            family="janus",
            variant=variant,
            model_class=class_name,
            tokenizer=JANUS,
            chat_template=templates.JANUS,
            files={
                "preprocessor_config.json": _preprocessor(
                    "JanusImageProcessor",
                    size,
                    background_color=[127, 127, 127],
                    image_mean=[0.5, 0.5, 0.5],
                    image_std=[0.5, 0.5, 0.5],
                ),
                "processor_config.json": {
                    "num_image_tokens": tokens,
                    "processor_class": "JanusProcessor",
                },
            },
            generation=GENERATION,
            **settings,
        )

    second = {
        "attention_bias": False,
        "depth": 3,
        "image_size": 50,
        "num_image_tokens": 25,
        "patch_size": 10,
    }
    return (
        case("untied", 16, config=config(False, {}, {})),
        case(
            "tied",
            25,
            config=config(True, {"hidden_size": 40, "num_key_value_heads": 2}, second),
            manner="saved",
        ),
    )


OCR = _tokenizer(
    "<image>",
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
    named={"image_token": "<image>"},
)


def _deepseek_ocr2() -> tuple[Case, Case]:
    class_name = "DeepseekOcr2ForConditionalGeneration"
    ids = OCR.ids

    def config(text: dict[str, Any], encoder: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": [class_name],
            "image_token_id": ids["<image>"],
            "model_type": "deepseek_ocr2",
            "text_config": {
                "model_type": "deepseek_ocr2_text",
                "hidden_size": 48,
                "intermediate_size": 84,
                "max_position_embeddings": 8192,
                "mlp_layer_types": ["dense", "sparse", "sparse"],
                "moe_intermediate_size": 20,
                "n_group": 1,
                "n_routed_experts": 6,
                "n_shared_experts": 2,
                "num_attention_heads": 4,
                "num_experts_per_tok": 2,
                "num_hidden_layers": 3,
                "num_key_value_heads": 4,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0,
                "routed_scaling_factor": 1.0,
                "tie_word_embeddings": False,
                "topk_group": 1,
                "topk_method": "greedy",
                "vocab_size": OCR.size + 2,
                **text,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "vision_config": {
                "model_type": "deepseek_ocr2_vision",
                "encoder_config": {
                    "model_type": "deepseek_ocr2_encoder",
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_attention_heads": 4,
                    "num_hidden_layers": 2,
                    "num_key_value_heads": 2,
                    "rope_theta": 1000000.0,
                    "vocab_size": 16,
                    **encoder,
                },
                # 64 x 64 patches, as at the true size: the query tables fit nothing else.
                "sam_config": {
                    "model_type": "deepseek_ocr2_sam_vision_model",
                    "downsample_channels": [12, encoder.get("hidden_size", 32)],
                    "global_attn_indexes": [1],
                    "hidden_size": 8,
                    "image_size": 256,
                    "mlp_ratio": 2.0,
                    "num_attention_heads": 1,
                    "num_hidden_layers": 2,
                    "output_channels": 8,
                    "patch_size": 4,
                    "window_size": 14,
                },
            },
        }

    preprocessor = {
        "background_color": [127, 127, 127],
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "DeepseekOcr2ImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "max_patches": 6,
        "min_patches": 2,
        "processor_class": "DeepseekOcr2Processor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 256, "width": 256},
        "tile_size": 192,
    }

    def case(variant: str, **settings: Any) -> Case:
        return Case(
            family="deepseek_ocr2",
            variant=variant,
            model_class=class_name,
            tokenizer=OCR,
            chat_template=templates.DEEPSEEK_OCR,
            files={
                "preprocessor_config.json": preprocessor,
                "processor_config.json": {
                    "downsample_ratio": 4,
                    "patch_size": 4,
                    "processor_class": "DeepseekOcr2Processor",
                },
            },
            generation=GENERATION,
            two_turns=False,
            large=(300, 150),
            **settings,
        )

    grouped = {"num_key_value_heads": 2, "n_shared_experts": 1, "num_experts_per_tok": 3}
    return (
        case("published", config=config({}, {})),
        case(
            "grouped",
            config=config(grouped, {"hidden_size": 24, "num_key_value_heads": 1}),
            manner="saved",
        ),
    )


CASES: tuple[Case, ...] = (
    *_deepseek_vl(),
    *_deepseek_vl_hybrid(),
    *_janus(),
    *_deepseek_ocr2(),
)
