"""Sizes, templates and weight names of Moondream 3, as its authors publish them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsin.checkpoint.weights import Rename
from opsin.decoder.config import (
    DecoderConfig,
    FactoredAttentionConfig,
    MoEConfig,
    ParallelLayerConfig,
    PlainMLPConfig,
)
from opsin.nn.rope import RopeConfig
from opsin.towers.vit import ViTConfig

EPS = 1e-5
# What the published config.json leaves to the authors' code.
TEXT: dict[str, Any] = {
    "dim": 2048,
    "ff_dim": 8192,
    "n_layers": 24,
    "vocab_size": 51200,
    "max_context": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "prefix_attn": 730,
    "rope_theta": 1500000.0,
}
EXPERTS = {"num_experts": 64, "start_layer": 4, "experts_per_token": 8, "expert_inner_dim": 1024}
VISION: dict[str, Any] = {
    "enc_dim": 1152,
    "enc_patch_size": 14,
    "enc_n_layers": 27,
    "enc_ff_dim": 4304,
    "enc_n_heads": 16,
    "proj_out_dim": 2048,
    "crop_size": 378,
    "in_channels": 3,
    "max_crops": 12,
    "overlap_margin": 4,
    "proj_inner_dim": 8192,
}
REGION = {"coord_feat_dim": 256, "coord_out_dim": 1024, "size_feat_dim": 512, "size_out_dim": 2048}
TEMPLATES: dict[str, Any] = {
    "caption": {
        "short": [1, 32708, 2, 12492, 3],
        "normal": [1, 32708, 2, 6382, 3],
        "long": [1, 32708, 2, 4059, 3],
    },
    "query": {"prefix": [1, 15381, 2], "suffix": [3]},
    "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
    "point": {"prefix": [1, 2581, 2], "suffix": [3]},
}
# The authors' names, and those of MLX, which has no region head.
RENAME: tuple[Rename, ...] = (
    (r"^model\.", ""),
    (r"^text\.(model\.)?wte(\.weight)?$", "decoder.embedding.weight"),
    (r"^text\.lm_head\.bias$", "decoder.head_bias"),
    (r"^text\.lm_head\.", "decoder.head."),
    (r"^text\.(model\.)?post_ln\.", "decoder.norm."),
    (r"^text\.(model\.)?blocks\.", "decoder.layers."),
    (r"^(decoder\..*\.mlp)\.fc1\.", r"\1.gate_up."),
    (r"^(decoder\..*\.mlp)\.fc2\.", r"\1.down."),
    (r"^(decoder\..*)\.ln\.", r"\1.norm."),
    (r"\.attn\.tau\.wq$", ".attention.query_factor.weight"),
    (r"\.attn\.tau\.wv$", ".attention.value_factor.weight"),
    (r"\.attn\.tau\.alpha$", ".attention.place_factor"),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.", ".attention."),
    (r"^vision\.proj_mlp\.", "towers.projector."),
    (r"^vision\.(encoder\.)?patch_emb\.", "towers.vision.patch."),
    (r"^vision\.(encoder\.)?pos_emb$", "towers.vision.positions.weight"),
    (r"^vision\.(encoder\.)?post_ln\.", "towers.vision.post_norm."),
    (r"^vision\.(encoder\.)?blocks\.", "towers.vision.layers."),
    (r"\.ln1\.", r".attention_norm."),
    (r"\.ln2\.", r".mlp_norm."),
    (r"\.fc1\.", r".up."),
    (r"\.fc2\.", r".down."),
    (r"^region\.(coord|size)_features$", r"towers.region.\1_in.frequencies"),
    (r"^region\.(coord|size)_encoder\.", r"towers.region.\1_in.out."),
    (r"^region\.(coord|size)_decoder\.", r"towers.region.\1_out."),
    (r"^region\.ln\.", "towers.region.norm."),
)


def dense_rename(count: int) -> tuple[Rename, ...]:
    """The names in the first `count` layers, whose weights are called as those of experts are."""
    numbers = "|".join(map(str, range(count))) or "none"
    own = rf"^(model\.)?text\.(model\.)?blocks\.({numbers})\.mlp\.fc"
    return (
        (own + r"1\.", r"decoder.layers.\3.mlp.up."),
        (own + r"2\.", r"decoder.layers.\3.mlp.down."),
    )


def decoder_of(text: Mapping[str, Any], moe: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that the config's parts "text" and "moe" describe."""
    head_dim = text["dim"] // text["n_heads"]
    attention = FactoredAttentionConfig(
        heads=text["n_heads"],
        kv_heads=text["n_kv_heads"],
        head_dim=head_dim,
        rope=RopeConfig(head_dim // 2, float(text["rope_theta"])),
        qkv_bias=True,
        out_bias=True,
        factors=True,
    )
    experts = MoEConfig(
        experts=moe["num_experts"],
        top_k=moe["experts_per_token"],
        hidden=moe["expert_inner_dim"],
        activation="gelu",
        router_bias=True,
        up_offset=1.0,
    )
    dense = PlainMLPConfig(text["ff_dim"], "gelu_tanh")
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        hidden=text["dim"],
        layers=tuple(
            ParallelLayerConfig(attention, dense if i < moe["start_layer"] else experts)
            for i in range(text["n_layers"])
        ),
        max_positions=text["max_context"],
        norm="layer",
        norm_eps=EPS,
        head_bias=True,
        open_stream=True,
    )


def tower_of(vision: Mapping[str, Any]) -> ViTConfig:
    """The vision tower that the config's part "vision" describes."""
    return ViTConfig(
        patch_dim=vision["in_channels"] * vision["enc_patch_size"] ** 2,
        hidden=vision["enc_dim"],
        layers=vision["enc_n_layers"],
        heads=vision["enc_n_heads"],
        mlp_hidden=vision["enc_ff_dim"],
        activation="gelu_tanh",
        norm_eps=EPS,
        positions=(vision["crop_size"] // vision["enc_patch_size"]) ** 2,
        post_norm=True,
    )
