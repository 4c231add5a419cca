"""Gemma's decoders (1, 2 and 3): norms around each block, windows by layer, capped scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.checkpoint.weights import Rename
from opsin.decoder.config import AttentionConfig, DecoderConfig, LayerConfig, MLPConfig
from opsin.families.llama_shape import ACTIVATIONS, LLAMA_RENAME, rope_parameters
from opsin.nn.rope import RopeConfig, scaling_pairs

# Gemma 2 and 3 have four norms a layer; Gemma 1 has the usual two, under the usual names.
GEMMA_RENAME: tuple[Rename, ...] = (
    (r"\.post_attention_layernorm\.", ".attention_post_norm."),
    (r"\.pre_feedforward_layernorm\.", ".mlp_norm."),
    (r"\.post_feedforward_layernorm\.", ".mlp_post_norm."),
    *LLAMA_RENAME,
)

_SECOND = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
# What published configs leave out, by the text config's `model_type`.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "gemma": {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
    "gemma2": _SECOND,
    "gemma3_text": {
        **_SECOND,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
    },
}


def gemma_decoder(text: Mapping[str, Any], *, tied: bool) -> DecoderConfig:
    """The decoder of a Gemma 1, 2 or 3 text config."""
    kind = text.get("model_type", "gemma3_text")
    text = {**DEFAULTS[kind], **text}
    activation = text.get("hidden_activation") or text.get("hidden_act") or "gelu_pytorch_tanh"
    mlp = MLPConfig(text["intermediate_size"], ACTIVATIONS[activation])
    layers = tuple(
        LayerConfig(_attention(text, kind, sliding=sliding), mlp, post_norms=kind != "gemma")
        for sliding in _sliding(text)
    )
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        hidden=text["hidden_size"],
        layers=layers,
        max_positions=text["max_position_embeddings"],
        norm="rms_unit_offset",
        norm_eps=text.get("rms_norm_eps", 1e-6),
        tied_head=tied,
        embedding_scale=text["hidden_size"] ** 0.5,
        logit_soft_cap=text.get("final_logit_softcapping"),
    )


def _sliding(text: Mapping[str, Any]) -> list[bool]:
    """Which layers see only a window: as listed, else all but every nth."""
    kinds, count = text.get("layer_types"), text["num_hidden_layers"]
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    pattern = text.get("sliding_window_pattern")
    return [bool(pattern and (i + 1) % pattern) for i in range(count)]


def _attention(text: Mapping[str, Any], kind: str, *, sliding: bool) -> AttentionConfig:
    third = kind == "gemma3_text"
    bias = bool(text.get("attention_bias", False))
    scalar = text.get("query_pre_attn_scalar")
    return AttentionConfig(
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        rope=gemma_rope(text, sliding=sliding) if third else _one_rope(text),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="rms_unit_offset" if third else None,
        window=text["sliding_window"] if sliding else None,
        scale=None if scalar is None else scalar**-0.5,
        # Gemma 3's configs may state a cap for the scores, which its attention never applies.
        soft_cap=None if third else text.get("attn_logit_softcapping"),
    )


def _one_rope(text: Mapping[str, Any]) -> RopeConfig:
    parameters = rope_parameters(text)
    return RopeConfig(
        dim=text["head_dim"],
        theta=float(parameters["rope_theta"]),
        scaling=scaling_pairs(parameters),
        max_positions=text["max_position_embeddings"],
    )


def gemma_rope(text: Mapping[str, Any], *, sliding: bool) -> RopeConfig:
    """The rope of a kind of layer: scaled and slow where all is seen, plain and fast in windows."""
    stated = (text.get("rope_parameters") or {}).get(
        "sliding_attention" if sliding else "full_attention"
    )
    parameters = dict(stated or {})
    if not sliding:
        parameters.update(text.get("rope_scaling") or {})
    theta = text.get("rope_local_base_freq", 1e4) if sliding else text.get("rope_theta", 1e6)
    return RopeConfig(
        dim=text["head_dim"],
        theta=float(parameters.get("rope_theta", theta)),
        scaling=scaling_pairs(parameters),
        max_positions=text["max_position_embeddings"],
    )
