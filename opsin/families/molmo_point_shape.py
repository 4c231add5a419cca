"""MolmoPoint's weight names, and its configs as those of the shared decoder and tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from opsin.checkpoint.weights import Rename
from opsin.decoder.config import AttentionConfig, DecoderConfig, LayerConfig, MLPConfig
from opsin.families.llama_shape import ACTIVATIONS
from opsin.families.molmo_shape import BLOCK_RENAME, TOWER_RENAME
from opsin.nn.rope import RopeConfig
from opsin.towers.vit import ViTConfig

TOWER = r"^(model\.vit|vision_model)\."
RENAME: tuple[Rename, ...] = (
    (r"^(model\.transformer|lm\.model)\.", "decoder."),
    (r"^(lm\.)?lm_head\.output_embeddings$", "decoder.head.weight[0]"),
    (r"^(lm\.)?lm_head\.new_output_embeddings$", "decoder.head.weight[1]"),
    (TOWER, "towers.vision."),
    (r"^(model\.)?connector\.image_pooling_2d\.", "towers.pooling."),
    (r"^(model\.)?connector\.image_projector\.", "towers.projector."),
    (r"^(model\.)?build_vit_embedding\.", "towers.points.part_in."),
    (r"^(model\.)?point_predictor\.add_no_point_class_embed\.vector$", "towers.points.no_more"),
    (r"^(model\.)?point_predictor\.", "towers.points."),
    (r"^(decoder\.blocks\.\d+)\.attn_norm\.", r"\1.attention_norm."),
    (r"^(decoder\.blocks\.\d+)\.ff_norm\.", r"\1.mlp_norm."),
    (r"^(decoder\.blocks\.\d+)\.self_attn\.([qk]_norm)\.", r"\1.attention.\2."),
    *BLOCK_RENAME,
    *TOWER_RENAME,
)


def decoder_of(text: Mapping[str, Any], words: tuple[int, int]) -> DecoderConfig:
    """The decoder of a text config; `words` are the runs of rows of its tables."""
    attention = AttentionConfig(
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        rope=RopeConfig(text["head_dim"], float(text["rope_theta"])),
        qkv_bias=bool(text.get("qkv_bias")),
        qk_norm="rms" if text.get("use_qk_norm") else None,
    )
    layer = LayerConfig(attention, MLPConfig(text["intermediate_size"]))
    return DecoderConfig(
        vocab_size=sum(words),
        hidden=text["hidden_size"],
        layers=(layer,) * text["num_hidden_layers"],
        max_positions=text["max_position_embeddings"],
        norm_eps=text["layer_norm_eps"],
        vocab_parts=words,
        open_stream=True,
    )


def tower_of(vit: Mapping[str, Any], layers: int) -> ViTConfig:
    """The first `layers` layers of a vision config's tower."""
    return ViTConfig(
        patch_dim=3 * vit["image_patch_size"] ** 2,
        hidden=vit["hidden_size"],
        layers=layers,
        heads=vit["num_attention_heads"],
        mlp_hidden=vit["intermediate_size"],
        activation=ACTIVATIONS[vit.get("hidden_act", "gelu_pytorch_tanh")],
        norm_eps=vit["layer_norm_eps"],
        positions=vit["image_num_pos"],
    )


def pooled(index: Tensor, high: int, wide: int) -> Tensor:
    """Blocks of a grid of numbers, filled up around it with -1: (rows, columns, high * wide)."""
    rows, columns = -index.shape[0] % high, -index.shape[1] % wide
    around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    padded = F.pad(index, around, value=-1)
    return padded.unfold(0, high, high).unfold(1, wide, wide).flatten(2)
