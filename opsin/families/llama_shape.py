"""The commonest decoder (Llama, Qwen, Mistral and their kin): its config keys and weight names."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from opsin.checkpoint.weights import Rename
from opsin.decoder.config import AttentionConfig, DecoderConfig, LayerConfig, MLPConfig, MoEConfig
from opsin.nn.norm import NormKind
from opsin.nn.rope import RopeConfig, scaling_pairs

ACTIVATIONS: Mapping[str, Any] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}

# Any prefix that published checkpoints put before the decoder, then each weight's name in it.
LLAMA_RENAME: tuple[Rename, ...] = (
    (r"^(model\.language_model\.|language_model\.model\.|model\.text_model\.|model\.)", "decoder."),
    (r"^(language_model\.)?lm_head\.", "decoder.head."),
    (r"^decoder\.embed_tokens\.", "decoder.embedding."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
    (r"\.self_attn\.q_proj\.(\w+)$", r".attention.qkv.\1[0]"),
    (r"\.self_attn\.k_proj\.(\w+)$", r".attention.qkv.\1[1]"),
    (r"\.self_attn\.v_proj\.(\w+)$", r".attention.qkv.\1[2]"),
    (r"\.self_attn\.o_proj\.", ".attention.out."),
    (r"\.self_attn\.q_norm\.", ".attention.q_norm."),
    (r"\.self_attn\.k_norm\.", ".attention.k_norm."),
    (r"\.mlp\.gate_proj\.(\w+)$", r".mlp.gate_up.\1[0]"),
    (r"\.mlp\.up_proj\.(\w+)$", r".mlp.gate_up.\1[1]"),
    (r"\.mlp\.down_proj\.", ".mlp.down."),
)

# A mixture of experts in the same decoder: one tensor an expert, or one for all of them.
EXPERT_RENAME: tuple[Rename, ...] = (
    (r"\.mlp\.gate\.weight$", ".mlp.router.weight"),
    (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.selection_bias"),
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.weight$", r".mlp.gate_up.weight[0,\1]"),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.weight$", r".mlp.gate_up.weight[1,\1]"),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.weight$", r".mlp.down.weight[0,\1]"),
    (r"\.mlp\.experts\.gate_up_proj$", ".mlp.gate_up.weight^T?"),
    (r"\.mlp\.experts\.down_proj$", ".mlp.down.weight^T?"),
    (r"\.mlp\.experts\.(gate_up|down)_proj\.weight$", r".mlp.\1.weight"),
    (r"\.mlp\.switch_mlp\.gate_proj\.weight$", ".mlp.gate_up.weight[0]"),
    (r"\.mlp\.switch_mlp\.up_proj\.weight$", ".mlp.gate_up.weight[1]"),
    (r"\.mlp\.switch_mlp\.down_proj\.weight$", ".mlp.down.weight"),
    (r"\.mlp\.shared_experts?\.gate_proj\.(\w+)$", r".mlp.shared.gate_up.\1[0]"),
    (r"\.mlp\.shared_experts?\.up_proj\.(\w+)$", r".mlp.shared.gate_up.\1[1]"),
    (r"\.mlp\.shared_experts?\.down_proj\.", ".mlp.shared.down."),
    (r"\.mlp\.shared_expert_gate\.", ".mlp.shared_gate."),
)


def rope_parameters(text: Mapping[str, Any]) -> dict[str, Any]:
    """A text config's rope settings under one name, theta included, whichever spelling it has."""
    parameters = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    parameters.setdefault("rope_theta", text.get("rope_theta", 10000.0))
    return parameters


def llama_decoder(
    text: Mapping[str, Any],
    *,
    tied: bool,
    axes: tuple[int, ...] = (),
    qkv_bias: bool | None = None,
    out_bias: bool | None = None,
    qk_norm: NormKind | None = None,
) -> DecoderConfig:
    """The decoder that a text config in Transformers' usual keys describes.

    `qkv_bias` and `out_bias` default to the config's `attention_bias`; `axes` is for M-RoPE.
    """
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    head_dim = text.get("head_dim") or hidden // heads
    rope = rope_parameters(text)
    bias = bool(text.get("attention_bias", False))
    attention = AttentionConfig(
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope=RopeConfig(
            dim=int(head_dim * (rope.get("partial_rotary_factor") or 1.0)),
            theta=float(rope["rope_theta"]),
            axes=axes,
            scaling=scaling_pairs({k: v for k, v in rope.items() if not k.startswith("mrope")}),
            max_positions=text["max_position_embeddings"],
        ),
        qkv_bias=bias if qkv_bias is None else qkv_bias,
        out_bias=bias if out_bias is None else out_bias,
        qk_norm=qk_norm,
    )
    mlp = MLPConfig(
        text["intermediate_size"],
        ACTIVATIONS[text.get("hidden_act", "silu")],
        bool(text.get("mlp_bias", False)),
    )
    windows = layer_windows(text)
    layers = tuple(
        LayerConfig(attention if window is None else _windowed(attention, window), mlp)
        for window in windows
    )
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        hidden=hidden,
        layers=layers,
        max_positions=text["max_position_embeddings"],
        norm_eps=text.get("rms_norm_eps", 1e-6),
        tied_head=tied,
    )


def expert_config(text: Mapping[str, Any]) -> MoEConfig:
    """The mixture of experts that a text config in Qwen's keys describes: softmax, normalised."""
    return MoEConfig(
        experts=text.get("num_experts") or text["num_local_experts"],
        top_k=text["num_experts_per_tok"],
        hidden=text["moe_intermediate_size"],
        activation=ACTIVATIONS[text.get("hidden_act", "silu")],
    )


def with_experts(config: DecoderConfig, moe: MoEConfig, sparse: Collection[int]) -> DecoderConfig:
    """The same decoder with a mixture of experts in the layers `sparse`."""
    layers = tuple(
        dataclasses.replace(layer, mlp=moe) if i in sparse else layer
        for i, layer in enumerate(config.layers)
    )
    return dataclasses.replace(config, layers=layers)


def layer_windows(text: Mapping[str, Any]) -> list[int | None]:
    """Each layer's sliding window, None for full attention."""
    count = text["num_hidden_layers"]
    window = text.get("sliding_window")
    kinds = text.get("layer_types")
    if window is None or text.get("use_sliding_window") is False:
        return [None] * count
    if kinds is not None:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    first = text.get("max_window_layers", 0)
    return [window if i >= first else None for i in range(count)]


def _windowed(attention: AttentionConfig, window: int) -> AttentionConfig:
    return dataclasses.replace(attention, window=window)
