"""Tiny Qwen3-VL MoE, Qwen3.5 and Qwen3.5 MoE checkpoints."""

from __future__ import annotations

import re
from typing import Any

import torch

from ..checkpoints import Case
from . import templates
from .qwen import (
    GENERATION,
    IDS,
    TOKENIZER,
    qwen3_preprocessor,
    qwen3_text,
    qwen3_vision,
    qwen_tokenizer,
)


def transpose_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as Qwen3-VL's checkpoints keep them, input axis before output axis."""
    return {
        name: value.transpose(1, 2).contiguous() if ".experts." in name else value
        for name, value in weights.items()
    }


def fuse_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor for all experts' gates and ups, one for their downs."""
    fused, groups = {}, {}
    for name, value in weights.items():
        found = re.match(r"(.*\.experts)\.(\d+)\.(\w+)_proj\.weight$", name)
        if found is None:
            fused[name] = value
        else:
            groups.setdefault((found[1], found[3]), {})[int(found[2])] = value
    for stem in sorted({stem for stem, _ in groups}):
        gate, up, down = (
            torch.stack([group[index] for index in sorted(group)])
            for group in (groups[stem, part] for part in ("gate", "up", "down"))
        )
        fused[f"{stem}.gate_up_proj"] = torch.cat((gate, up), dim=1)
        fused[f"{stem}.down_proj"] = down
    return fused


THINKING = qwen_tokenizer(thinking=True)


def _ids() -> dict[str, int]:
    return {
        "image_token_id": IDS["<|image_pad|>"],
        "video_token_id": IDS["<|video_pad|>"],
        "vision_start_token_id": IDS["<|vision_start|>"],
        "vision_end_token_id": IDS["<|vision_end|>"],
    }


def _qwen3_vl_moe() -> tuple[Case, Case]:
    experts = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 28,
        "norm_topk_prob": True,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    class_name = "Qwen3VLMoeForConditionalGeneration"
    every_layer = {
        "architectures": [class_name],
        "model_type": "qwen3_vl_moe",
        **_ids(),
        "tie_word_embeddings": False,
        "text_config": qwen3_text("qwen3_vl_moe_text", tie_word_embeddings=False, **experts),
        "vision_config": qwen3_vision(model_type="qwen3_vl_moe"),
    }
    some_layers = {
        "architectures": [class_name],
        "model_type": "qwen3_vl_moe",
        **_ids(),
        "tie_word_embeddings": True,
        "text_config": qwen3_text(
            "qwen3_vl_moe_text",
            **{**experts, "mlp_only_layers": [0], "num_experts": 5, "num_experts_per_tok": 3},
            num_key_value_heads=1,
        ),
        "vision_config": qwen3_vision(
            model_type="qwen3_vl_moe", deepstack_visual_indexes=[1], depth=2
        ),
    }
    preprocessor = {"preprocessor_config.json": qwen3_preprocessor(16384)}
    return (
        Case(
            "qwen3_vl_moe",
            "every_layer",
            class_name,
            every_layer,
            TOKENIZER,
            templates.QWEN3_VL,
            "chat_template.json",
            preprocessor,
            GENERATION,
            repack=transpose_experts,
        ),
        Case(
            "qwen3_vl_moe",
            "some_layers_tied",
            class_name,
            some_layers,
            TOKENIZER,
            templates.QWEN3_VL,
            files=preprocessor,
            generation=GENERATION,
            manner="saved",
        ),
    )


def _hybrid_text(model_type: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": THINKING.size + 2,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "bos_token_id": None,
        "eos_token_id": IDS["<|endoftext|>"],
        "dtype": "float32",
        "full_attention_interval": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 48,
        "intermediate_size": 72,
        "layer_types": [
            "linear_attention",
            "full_attention",
            "linear_attention",
            "full_attention",
        ],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 12,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "use_cache": True,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        **changes,
    }


def _hybrid(family: str, class_name: str, texts: list[int]) -> list[Case]:
    tied = [False, True]
    cases = []
    for index, text in enumerate(texts):
        vision = qwen3_vision(
            model_type=family,
            deepstack_visual_indexes=[],
            depth=2 + index,
            out_hidden_size=text["hidden_size"],
        )
        config = {
            "architectures": [class_name],
            "model_type": family,
            **_ids(),
            "tie_word_embeddings": tied[index],
            "text_config": {**text, "tie_word_embeddings": tied[index]},
            "vision_config": vision,
        }
        cases.append(
            Case(
                family,
                "tied" if tied[index] else "untied",
                class_name,
                config,
                THINKING,
                templates.QWEN3_5,
                files={
                    "preprocessor_config.json": qwen3_preprocessor(16384 - 4096 * index),
                },
                generation=GENERATION,
                manner="saved" if index else "published",
                repack=fuse_experts if index and "num_experts" in text else None,
                gains=((r"A_log", 10.0), (r"dt_bias", 5.0), (r"conv1d", 1.5)),
            )
        )
    return cases


def _qwen3_5() -> list[Case]:
    texts = [
        _hybrid_text("qwen3_5_text"),
        _hybrid_text(
            "qwen3_5_text",
            hidden_size=40,
            head_dim=16,
            num_attention_heads=5,
            num_key_value_heads=1,
            linear_num_key_heads=3,
            linear_num_value_heads=3,
            linear_value_head_dim=10,
            num_hidden_layers=3,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            rope_parameters={
                "mrope_interleaved": True,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.5,
                "rope_theta": 100000,
                "rope_type": "default",
            },
        ),
    ]
    return _hybrid("qwen3_5", "Qwen3_5ForConditionalGeneration", texts)


def _qwen3_5_moe() -> list[Case]:
    experts = {
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    texts = [
        _hybrid_text("qwen3_5_moe_text", **experts),
        _hybrid_text(
            "qwen3_5_moe_text",
            **{**experts, "num_experts": 4, "num_experts_per_tok": 3},
            hidden_size=40,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
        ),
    ]
    for text in texts:
        del text["intermediate_size"]
    return _hybrid("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", texts)


CASES: tuple[Case, ...] = (*_qwen3_vl_moe(), *_qwen3_5(), *_qwen3_5_moe())
