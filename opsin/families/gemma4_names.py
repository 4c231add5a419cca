"""What the tensors of Gemma 4 are called."""

from __future__ import annotations

from opsin.checkpoint.weights import Rename
from opsin.families.gemma_shape import GEMMA_RENAME

AUDIO = r"^(towers\.audio\.layers\.\d+)\."
GEMMA4_RENAME: tuple[Rename, ...] = (
    (r"^(model\.)?vision_tower\.", "towers.vision."),
    (r"^(model\.)?audio_tower\.", "towers.audio."),
    (r"^(model\.)?embed_(vision|audio)\.embedding_projection\.", r"towers.embed_\2."),
    (r"^towers\.vision\.patch_embedder\.input_proj\.", "towers.vision.patch."),
    (r"^towers\.vision\.patch_embedder\.position_embedding_table$", "towers.vision.positions"),
    (r"^towers\.vision\.encoder\.", "towers.vision."),
    (r"^towers\.vision\.std_bias$", "towers.vision.mean"),
    (r"^towers\.vision\.std_scale$", "towers.vision.scale"),
    (r"^(towers\..*)\.self_attn\.post\.", r"\1.attention.o."),
    (r"^(towers\..*)\.self_attn\.relative_k_proj\.", r"\1.attention.distance."),
    (r"^(towers\..*)\.self_attn\.([qkvo])_proj\.", r"\1.attention.\2."),
    (r"^(towers\..*)\.self_attn\.", r"\1.attention."),
    (r"^(towers\..*)\.mlp\.(gate|up|down)_proj\.", r"\1.mlp.\2."),
    (r"^towers\.audio\.subsample_conv_projection\.layer0\.(conv\.)?", "towers.audio.first."),
    (r"^towers\.audio\.subsample_conv_projection\.layer1\.(conv\.)?", "towers.audio.second."),
    (
        r"^towers\.audio\.subsample_conv_projection\.input_proj_linear\.",
        "towers.audio.project.",
    ),
    (r"^towers\.audio\.output_proj\.", "towers.audio.out."),
    (AUDIO + r"feed_forward1\.", r"\1.first."),
    (AUDIO + r"feed_forward2\.", r"\1.second."),
    (AUDIO + r"(first|second)\.ffw_layer_1\.", r"\1.\2.up."),
    (AUDIO + r"(first|second)\.ffw_layer_2\.", r"\1.\2.down."),
    (AUDIO + r"(first|second|lconv1d)\.(pre|post)_layer_norm\.", r"\1.\2.\3_norm."),
    (AUDIO + r"lconv1d\.", r"\1.convolution."),
    (AUDIO + r"convolution\.linear_(start|end)\.", r"\1.convolution.\2."),
    (AUDIO + r"convolution\.depthwise_conv1d\.", r"\1.convolution."),
    (AUDIO + r"convolution\.conv_norm\.", r"\1.convolution.norm."),
    (AUDIO + r"norm_pre_attn\.", r"\1.attention_norm."),
    (AUDIO + r"norm_post_attn\.", r"\1.attention_post_norm."),
    (AUDIO + r"norm_out\.", r"\1.norm."),
    *GEMMA_RENAME,
    (r"^decoder\.embed_tokens_per_layer\.", "decoder.layer_inputs.table."),
    (r"^decoder\.per_layer_model_projection\.", "decoder.layer_inputs.project."),
    (r"^decoder\.per_layer_projection_norm\.", "decoder.layer_inputs.norm."),
    (r"\.per_layer_input_gate\.", ".input_gate."),
    (r"\.per_layer_projection\.", ".input_out."),
    (r"\.post_per_layer_input_norm\.", ".input_norm."),
    (r"\.layer_scalar$", ".scalar"),
    (r"\.router\.proj\.", ".experts.router."),
    (r"\.router\.scale$", ".experts.choice_scale"),
    (r"\.router\.per_expert_scale$", ".experts.expert_scale"),
    (r"\.experts\.gate_up_proj$", ".experts.gate_up.weight"),
    (r"\.experts\.down_proj$", ".experts.down.weight"),
    (r"\.post_feedforward_layernorm_1\.", ".dense_post_norm."),
    (r"\.post_feedforward_layernorm_2\.", ".experts_post_norm."),
    (r"\.pre_feedforward_layernorm_2\.", ".experts_norm."),
)
