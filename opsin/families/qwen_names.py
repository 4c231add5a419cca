"""The weights of the Qwen-VL line by name: its vision transformer, and the merger behind it."""

from __future__ import annotations

from opsin.checkpoint.weights import Rename
from opsin.families.llama_shape import LLAMA_RENAME

QWEN_RENAME: tuple[Rename, ...] = (
    (r"^(model\.)?visual\.", "towers.vision."),
    (r"^towers\.vision\.merger\.ln_q\.", "towers.merger.norm."),
    (r"^towers\.vision\.merger\.mlp\.0\.", "towers.merger.up."),
    (r"^towers\.vision\.merger\.mlp\.2\.", "towers.merger.down."),
    (r"^towers\.vision\.patch_embed\.proj\.", "towers.vision.patch."),
    (r"^towers\.vision\.blocks\.(\d+)\.norm1\.", r"towers.vision.layers.\1.attention_norm."),
    (r"^towers\.vision\.blocks\.(\d+)\.norm2\.", r"towers.vision.layers.\1.mlp_norm."),
    (r"^towers\.vision\.blocks\.(\d+)\.attn\.qkv\.", r"towers.vision.layers.\1.attention.qkv."),
    (
        r"^towers\.vision\.blocks\.(\d+)\.attn\.proj\.",
        r"towers.vision.layers.\1.attention.out.",
    ),
    (r"^towers\.vision\.blocks\.(\d+)\.mlp\.fc1\.", r"towers.vision.layers.\1.mlp.up."),
    (r"^towers\.vision\.blocks\.(\d+)\.mlp\.fc2\.", r"towers.vision.layers.\1.mlp.down."),
    *LLAMA_RENAME,
)
