"""Gemma 4's towers as its configs describe them, and what published configs leave out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from opsin.decoder.config import (
    EnrichedLayerConfig,
    MLPConfig,
    MoEConfig,
    SharedAttentionConfig,
)
from opsin.errors import MediaError
from opsin.families.llama_shape import ACTIVATIONS
from opsin.nn.rope import RopeConfig, scaling_pairs
from opsin.towers.axial_vit import AxialConfig
from opsin.towers.usm import USMConfig

TEXT = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
}
ROPES: Mapping[str, Mapping[str, Any]] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e6,
    },
}


def layer_shape(
    text: Mapping[str, Any], kinds: Sequence[str], index: int, own: int
) -> EnrichedLayerConfig:
    """One layer; those from `own` on read the last own keys and values of their kind."""
    activation = ACTIVATIONS[text["hidden_activation"]]
    wide = 2 if index >= own and text.get("use_double_wide_mlp") else 1
    experts = None
    if text.get("enable_moe_block"):
        experts = MoEConfig(
            experts=text["num_experts"],
            top_k=text["top_k_experts"],
            hidden=text["moe_intermediate_size"],
            activation=activation,
        )
    return EnrichedLayerConfig(
        attention=attention_shape(text, kinds, index, own),
        mlp=MLPConfig(text["intermediate_size"] * wide, activation),
        post_norms=True,
        input_dim=text["hidden_size_per_layer_input"] or 0,
        scaled=True,
        experts=experts,
    )


def attention_shape(
    text: Mapping[str, Any], kinds: Sequence[str], index: int, own: int
) -> SharedAttentionConfig:
    """One layer's attention; layers from `own` on read the last own keys of their kind."""
    kind = kinds[index]
    full = kind == "full_attention"
    same = full and bool(text.get("attention_k_eq_v"))
    head_dim = text["global_head_dim"] if full else text["head_dim"]
    kv_heads = text["num_key_value_heads"]
    if same:
        kv_heads = text.get("num_global_key_value_heads") or kv_heads
    rope = (text.get("rope_parameters") or ROPES)[kind]
    source = None
    if index >= own:
        source = max(i for i in range(own) if kinds[i] == kind)
    stated = (text.get("per_layer_config") or {}).get(str(index)) or {}
    head_dim = stated.get("head_dim", head_dim)
    kv_heads = stated.get("num_key_value_heads", kv_heads)
    bias = bool(text.get("attention_bias", False))
    return SharedAttentionConfig(
        heads=text["num_attention_heads"],
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=RopeConfig(head_dim, float(rope["rope_theta"]), scaling=scaling_pairs(rope)),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="rms",
        window=None if full else text["sliding_window"],
        scale=1.0,
        shared_from=source,
        values_are_keys=same,
        causal_only=full,
    )


def vision_shape(vision: Mapping[str, Any]) -> AxialConfig:
    """The tower that a vision config describes."""
    rope = vision.get("rope_parameters") or {}
    heads = vision.get("num_attention_heads", 12)
    return AxialConfig(
        patch=vision.get("patch_size", 16),
        hidden=vision.get("hidden_size", 768),
        layers=vision.get("num_hidden_layers", 16),
        heads=heads,
        kv_heads=vision.get("num_key_value_heads", 12),
        head_dim=vision.get("head_dim", 64),
        mlp_hidden=vision.get("intermediate_size", 3072),
        positions=vision.get("position_embedding_size", 10240),
        pool=vision.get("pooling_kernel_size", 3),
        activation=ACTIVATIONS[vision.get("hidden_activation", "gelu_pytorch_tanh")],
        norm_eps=vision.get("rms_norm_eps", 1e-6),
        theta=float(rope.get("rope_theta", 100.0)),
        clipped=bool(vision.get("use_clipped_linears", False)),
        standardised=bool(vision.get("standardize", False)),
    )


def audio_shape(audio: Mapping[str, Any]) -> USMConfig:
    """The encoder that an audio config describes."""
    first, second = audio.get("subsampling_conv_channels", (128, 32))
    return USMConfig(
        hidden=audio.get("hidden_size", 1024),
        layers=audio.get("num_hidden_layers", 12),
        heads=audio.get("num_attention_heads", 8),
        channels=(first, second),
        out=audio.get("output_proj_dims", 1536),
        past=audio.get("attention_context_left", 13) - 1,
        kernel=audio.get("conv_kernel_size", 5),
        cap=audio.get("attention_logit_cap", 50.0),
        half_step=audio.get("residual_weight", 0.5),
        activation=ACTIVATIONS[audio.get("hidden_act", "silu")],
        norm_eps=audio.get("rms_norm_eps", 1e-6),
        clipped=bool(audio.get("use_clipped_linears", True)),
    )


def fitted_size(size: tuple[int, int], step: int, most: int) -> tuple[int, int]:
    """The largest (width, height) in steps of `step` that makes at most `most` squares of them.

    Raises MediaError for a picture so small and narrow that nothing is left of it.
    """
    factor = math.sqrt(most * step**2 / (size[0] * size[1]))
    width, height = (math.floor(factor * side / step) * step for side in size)
    if height == 0:
        width, height = min(size[0] // size[1], most) * step, step
    elif width == 0:
        width, height = step, min(size[1] // size[0], most) * step
    if not width * height or width * height > most * step**2:
        raise MediaError(
            f"The picture cannot be fitted ({size[0]}x{size[1]})",
            why=f"this model cuts it into at most {most} squares",
            remedy="Crop it or pad it",
            param="image",
        )
    return width, height
