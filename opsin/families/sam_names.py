"""The weights of Segment Anything's image encoder by name."""

from __future__ import annotations

from opsin.checkpoint.weights import Rename

# SAM's weight names, the authors' and Transformers', after a prefix that becomes "towers.sam.".
SAM_RENAME: tuple[Rename, ...] = (
    (r"^towers\.sam\.blocks\.", "towers.sam.layers."),
    (r"^(towers\.sam\.layers\.\d+)\.(layer_)?norm1\.", r"\1.attention_norm."),
    (r"^(towers\.sam\.layers\.\d+)\.(layer_)?norm2\.", r"\1.mlp_norm."),
    (r"^(towers\.sam\.layers\.\d+)\.attn\.qkv\.", r"\1.attention.qkv."),
    (r"^(towers\.sam\.layers\.\d+)\.attn\.proj\.", r"\1.attention.out."),
    (r"^(towers\.sam\.layers\.\d+)\.attn\.rel_pos_h$", r"\1.attention.row_offsets"),
    (r"^(towers\.sam\.layers\.\d+)\.attn\.rel_pos_w$", r"\1.attention.column_offsets"),
    (r"^(towers\.sam\.layers\.\d+)\.mlp\.lin1\.", r"\1.up."),
    (r"^(towers\.sam\.layers\.\d+)\.mlp\.lin2\.", r"\1.down."),
    (r"^towers\.sam\.patch_embed\.proj(ection)?\.", "towers.sam.patch."),
    (r"^towers\.sam\.pos_embed$", "towers.sam.positions"),
    (r"^towers\.sam\.neck\.(0|conv1)\.", "towers.sam.neck."),
    (r"^towers\.sam\.neck\.(1|layer_norm1)\.", "towers.sam.neck_norm."),
    (r"^towers\.sam\.neck\.(2|conv2)\.", "towers.sam.mix."),
    (r"^towers\.sam\.neck\.(3|layer_norm2)\.", "towers.sam.mix_norm."),
    (r"^towers\.sam\.(net_2|proj\.conv1)\.", "towers.sam.reductions.0."),
    (r"^towers\.sam\.(net_3|proj\.conv2)\.", "towers.sam.reductions.1."),
)
