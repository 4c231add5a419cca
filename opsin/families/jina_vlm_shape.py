"""jina-vlm's weight names, which of its configs are built, and their decoder and tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from opsin.checkpoint.weights import Rename
from opsin.decoder.config import DecoderConfig
from opsin.families.llama_shape import ACTIVATIONS, llama_decoder
from opsin.towers.vit import ViTConfig

# The authors' prefixes, and those of their conversion for MLX, which has fused biases.
TOWER, TEXT = r"^(model\.)?vision_model\.", r"^(model\.)?language_model\."
CONNECTOR = r"^(model\.)?(vision_model\.)?vl_connector\."
TEXT_BIAS = TEXT + r"layers\.\d+\.attn\.(q_b|qkv\.bias)$"
# Products that hold a value and then its gate.
GATED = rf"({TEXT}.*\.ffn|{CONNECTOR}projector)\.(gate_)?up\.weight$"
RENAME: tuple[Rename, ...] = (
    (CONNECTOR + r"pad_embed$", "towers.padding.weight"),
    (CONNECTOR, "towers."),
    (TOWER + r"pos_embed$", "towers.vision.positions.weight"),
    (TOWER + r"patch_embed\.proj\.", "towers.vision.patch."),
    (TOWER + r"post_l?norm\.", "towers.vision.post_norm."),
    (TOWER, "towers.vision."),
    (r"^(language_model\.)?lm_head\.", "decoder.head."),
    (TEXT + r"embedding\.embedding$", "decoder.embedding.weight[0]"),
    (TEXT + r"embedding\.new_embedding$", "decoder.embedding.weight[1]"),
    (TEXT + r"ln_f\.", "decoder.norm."),
    (TEXT, "decoder."),
    (r"\.attn_l?norm\.", ".attention_norm."),
    (r"\.ffn_l?norm\.", ".mlp_norm."),
    (r"\.attn\.qkv(_w)?\.", ".attention.qkv."),
    (r"\.attn\.q_b$", ".attention.qkv.bias[0]"),
    (r"\.attn\.k_b$", ".attention.qkv.bias[1]"),
    (r"\.attn\.v_b$", ".attention.qkv.bias[2]"),
    (r"\.attn\.([qk])_l?norm\.", r".attention.\1_norm."),
    (r"\.attn\.out\.", ".attention.out."),
    (r"^towers\.pooling\.q(_w)?\.", "towers.pooling.query."),
    (r"^towers\.pooling\.q_b$", "towers.pooling.query.bias"),
    (r"^towers\.pooling\.kv(_w)?\.", "towers.pooling.key_value."),
    (r"^towers\.pooling\.k_b$", "towers.pooling.key_value.bias[0]"),
    (r"^towers\.pooling\.v_b$", "towers.pooling.key_value.bias[1]"),
    (r"\.ffn\.", ".mlp."),
    (r"\.(gate_)?up_gate\.weight$", ".gate_up.weight[0]"),
    (r"\.(gate_)?up_up\.weight$", ".gate_up.weight[1]"),
)

# What of the authors' blocks is built: the values of their options, where a config states them.
BLOCK = {"postnorm": False, "attn_lscale_init": None, "ffn_lscale_init": None}
ATTENTION = {
    "clip_qkv": None,
    "inner_lnorm": False,
    "sliding_window": -1,
    "softmax_scale": None,
    "v_lnorm": False,
}
VISION = {
    "linear_patch_embedding": True,
    "pre_lnorm": False,
    "use_absolute_positional_embeddings": True,
    "use_cls_token": False,
}
LANGUAGE = {"normalize_input_embeds": False, "rope": True}
PAIRS = {"pooling_h": 2, "pooling_w": 2}
CONNECTED = PAIRS | {
    "padding_embed_type": "pad_and_partial_pad",
    "pooling_type": "attention_meanq",
    "projector_type": "mlp",
}
PROCESSED = PAIRS | {
    "cropping_method": "overlap-and-resize",
    "preserve_aspect_ratio": False,
    "random_interpolation": False,
}
GATED_FEED = {"gated_activation": True, "inner_lnorm": False, "bias": False}
PLAIN_FEED = {"gated_activation": False, "inner_lnorm": False}
HEAD_NORMS = {"q_lnorm": True, "k_lnorm": True, "qkv_lnorm_on_heads": True}
NO_NORMS = {"q_lnorm": False, "k_lnorm": False}


def unlike(
    text: Mapping[str, Any], vision: Mapping[str, Any], processor: Mapping[str, Any]
) -> Iterator[str]:
    """Names of options, where the configs state them, whose values are not what is built."""
    connector = vision["vl_connector_config"]
    spoken, seen = text["block_config"], vision["block_config"]
    attention = spoken["attn_config"]
    normed = bool(attention.get("q_lnorm") or attention.get("k_lnorm"))
    wanted = (
        (text, LANGUAGE),
        (vision, VISION),
        (connector, CONNECTED),
        (processor, PROCESSED),
        (spoken, BLOCK),
        (seen, BLOCK),
        (attention, ATTENTION | (HEAD_NORMS if normed else {})),
        (seen["attn_config"], ATTENTION | NO_NORMS),
        (connector["attn_pooling_config"], ATTENTION | NO_NORMS),
        (spoken["ffn_config"], GATED_FEED),
        (seen["ffn_config"], PLAIN_FEED),
        (connector["mlp_projector_config"], GATED_FEED),
        (spoken["lnorm_config"], {"type": "rms"}),
        (seen["lnorm_config"], {"type": "default", "bias": True}),
    )
    for stated, built in wanted:
        yield from (name for name in built if stated.get(name, built[name]) != built[name])


def inner_width(feed: Mapping[str, Any], width: int) -> int:
    """A feed-forward block's inner width."""
    return int(feed.get("size") or feed["ratio"] * width)


def decoder_of(text: Mapping[str, Any], *, tied: bool, biased: bool) -> DecoderConfig:
    """The decoder of a text config; `biased` are its queries, keys and values."""
    attention, feed = (text["block_config"][name] for name in ("attn_config", "ffn_config"))
    hidden = text["hidden_size"]
    rope = {
        "rope_theta": text["rope_theta"],
        "partial_rotary_factor": text.get("partial_rotary_factor"),
        **(text.get("rope_scaling") or {}),
    }
    named = {
        "head_dim": attention.get("head_dim"),
        "hidden_act": feed["activation_type"],
        "hidden_size": hidden,
        "intermediate_size": inner_width(feed, hidden),
        "max_position_embeddings": text.get("max_position_embeddings")
        or text["max_sequence_length"],
        "num_attention_heads": attention["n_heads"],
        "num_hidden_layers": text["n_layers"],
        "num_key_value_heads": attention.get("n_kv_heads"),
        "rms_norm_eps": text["block_config"]["lnorm_config"].get("eps") or 1e-5,
        "rope_parameters": rope,
        "vocab_size": text.get("embedding_size") or text["vocab_size"],
    }
    config = llama_decoder(
        named,
        tied=tied,
        qkv_bias=biased,
        out_bias=bool(attention.get("o_bias")),
        qk_norm="rms" if attention.get("q_lnorm") else None,
    )
    return replace(config, extra_embeddings=text["additional_vocab_size"])


def tower_of(vision: Mapping[str, Any], layers: int, *, post_norm: bool) -> ViTConfig:
    """The first `layers` layers of a vision config's tower."""
    block, patch = vision["block_config"], vision["patch_size"]
    feed = block["ffn_config"]
    return ViTConfig(
        patch_dim=3 * patch**2,
        hidden=vision["hidden_size"],
        layers=layers,
        heads=block["attn_config"]["n_heads"],
        mlp_hidden=inner_width(feed, vision["hidden_size"]),
        activation=ACTIVATIONS[feed["activation_type"]],
        norm_eps=block["lnorm_config"].get("eps") or 1e-5,
        patch_bias=vision.get("patch_embedding_bias", True),
        out_bias=bool(block["attn_config"].get("o_bias")),
        mlp_bias=bool(feed.get("bias")),
        positions=(vision["input_size"][0] // patch) ** 2,
        post_norm=post_norm,
    )
