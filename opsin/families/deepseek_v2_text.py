"""DeepSeek-V2's text model (arXiv:2405.04434): a mixture of experts, with latent attention or plain
attention.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from opsin.checkpoint.weights import Rename
from opsin.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
)
from opsin.families.llama_shape import ACTIVATIONS, llama_decoder, rope_parameters, with_experts
from opsin.nn.rope import RopeConfig, scaling_pairs

# Latent attention's weights; to be tried before those of plain attention.
LATENT_RENAME: tuple[Rename, ...] = (
    (r"\.self_attn\.q(?:_a)?_proj\.", ".attention.query."),
    (r"\.self_attn\.q_a_layernorm\.", ".attention.query_norm."),
    (r"\.self_attn\.q_b_proj\.", ".attention.query_up."),
    (r"\.self_attn\.kv_a_proj_with_mqa\.", ".attention.latent."),
    (r"\.self_attn\.kv_a_layernorm\.", ".attention.latent_norm."),
    (r"\.self_attn\.kv_b_proj\.", ".attention.maps."),
)
# What the authors' configuration class adds to a config that asks for latent attention.
LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def deepseek_decoder(text: Mapping[str, Any], *, tied: bool, latent: bool) -> DecoderConfig:
    """The decoder that a config in DeepSeek's keys describes, with latent attention or without."""
    text = {key: value for key, value in text.items() if key != "head_dim"}
    text.setdefault("max_position_embeddings", 2048)
    decoder = llama_decoder(text, tied=tied)
    if latent:
        attention = latent_attention({**LATENT, **text})
        decoder = dataclasses.replace(
            decoder, layers=tuple(_attending(layer, attention) for layer in decoder.layers)
        )
    sparse = sparse_layers(text)
    return with_experts(decoder, deepseek_experts(text), sparse) if sparse else decoder


def _attending(layer: LayerConfig, attention: AttentionConfig) -> LayerConfig:
    return dataclasses.replace(layer, attention=attention)


def latent_attention(text: Mapping[str, Any]) -> LatentAttentionConfig:
    """Latent attention as a complete config describes it."""
    turning, plain, latent = (
        text[key] for key in ("qk_rope_head_dim", "qk_nope_head_dim", "kv_lora_rank")
    )
    rope, bias = rope_parameters(text), bool(text.get("attention_bias", False))
    sharper = 1.0  # YaRN's factor on the scores
    if rope.get("mscale_all_dim") and rope.get("factor", 1.0) > 1:
        sharper = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
    return LatentAttentionConfig(
        heads=text["num_attention_heads"],
        kv_heads=1,
        head_dim=turning + latent,
        rope=RopeConfig(
            turning,
            float(rope["rope_theta"]),
            pairs="adjacent",
            scaling=scaling_pairs(rope),
            max_positions=text["max_position_embeddings"],
        ),
        qkv_bias=bias,
        out_bias=bias,
        scale=(plain + turning) ** -0.5 * sharper**2,
        latent=latent,
        plain_dim=plain,
        value_dim=text["v_head_dim"],
        query_rank=text["q_lora_rank"],
    )


def sparse_layers(text: Mapping[str, Any]) -> list[int]:
    """Which layers have experts."""
    count, every = text["num_hidden_layers"], text.get("moe_layer_freq", 1)
    if kinds := text.get("mlp_layer_types"):
        return [i for i, kind in enumerate(kinds) if kind == "sparse"]
    if text.get("n_routed_experts", 64) is None:
        return []
    first = text.get("first_k_dense_replace", 0)
    return [i for i in range(first, count) if i % every == 0]


def deepseek_experts(text: Mapping[str, Any]) -> MoEConfig:
    """The experts that a config in DeepSeek's keys describes."""
    activation = ACTIVATIONS[text.get("hidden_act", "silu")]
    inner, shared = text.get("moe_intermediate_size", 1407), text.get("n_shared_experts", 2)
    method = text.get("topk_method", "greedy")
    groups = text.get("n_group") or 1
    corrected = method == "noaux_tc"
    limited = groups > 1 and method in ("group_limited_greedy", "noaux_tc")
    return MoEConfig(
        experts=text.get("n_routed_experts", 64),
        top_k=text["num_experts_per_tok"],
        hidden=inner,
        activation=activation,
        router="sigmoid" if text.get("scoring_func") == "sigmoid" else "softmax",
        precise_router=True,
        normalise=bool(text.get("norm_topk_prob", False)) and text["num_experts_per_tok"] > 1,
        min_total=1e-20,
        scale=text.get("routed_scaling_factor", 1.0),
        limits=(int(groups), int(text["topk_group"])) if limited else None,
        limits_by=2 if corrected else 1,
        selection_bias=corrected,
        shared=MLPConfig(inner * shared, activation) if shared else None,
    )
