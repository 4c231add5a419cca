"""Tiny checkpoints whose text model is not the commonest of their family."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..checkpoints import Case
from . import vlm_more


def _case(name: str) -> Case:
    return next(case for case in vlm_more.CASES if case.name == name)


def _with_text(case: Case, variant: str, **changes: Any) -> Case:
    """A case with another text config and, if they are given, other settings of its own."""
    text = {**case.config["text_config"], **changes.pop("text")}
    config = {**case.config, **changes.pop("config", {}), "text_config": text}
    return dataclasses.replace(case, variant=variant, config=config, **changes)


def _granite() -> Case:
    base = _case("llava_next-vicuna_two_layers")
    return _with_text(
        base,
        "granite_siglip",
        text={
            "model_type": "granite",
            "architectures": ["GraniteForCausalLM"],
            "attention_multiplier": 0.08,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
        },
        config={
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "image_size": 30,
                "intermediate_size": 60,
                "num_attention_heads": 2,
                "num_hidden_layers": 3,
                "patch_size": 10,
                "vision_use_head": False,
            },
            "vision_feature_layer": [-3, 2, -1],
            "vision_feature_select_strategy": "full",
        },
        files={
            **base.files,
            "processor_config.json": {
                **base.files["processor_config.json"],
                "num_additional_image_tokens": 0,
                "vision_feature_select_strategy": "full",
            },
        },
        seed=38,
    )


def _qwen3_moe() -> Case:
    return _with_text(
        _case("internvl-small"),
        "qwen3_moe",
        text={
            "model_type": "qwen3_moe",
            "rope_scaling": None,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [1],
        },
        seed=39,
    )


def _ministral3() -> Case:
    return _with_text(
        _case("mistral3-untied"),
        "ministral3",
        text={
            "model_type": "ministral3",
            "rope_theta": None,
            "rope_parameters": {
                "type": "yarn",
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        seed=44,
    )


CASES: tuple[Case, ...] = (_granite(), _qwen3_moe(), _ministral3())
