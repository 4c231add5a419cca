"""What the tensors of Gemma 3n are called."""

from __future__ import annotations

from opsin.checkpoint.weights import Rename
from opsin.families.gemma_shape import GEMMA_RENAME

SIGHT = r"^(towers\.vision\..*)\."
HEARING = r"^(towers\.audio\.layers\.\d+)\."
EMBEDDER = r"^(model\.)?embed_(vision|audio)\."
VISION_RENAME: tuple[Rename, ...] = (
    (r"^(model\.)?vision_tower\.timm_model\.", "towers.vision."),
    (r"^towers\.vision\.conv_stem\.", "towers.vision.stem."),
    (r"^towers\.vision\.msfa\.ffn\.", "towers.vision.fusion.mix."),
    (r"^towers\.vision\.msfa\.", "towers.vision.fusion."),
    (SIGHT + r"bn\.", r"\1.norm."),
    (SIGHT + r"conv_exp\.", r"\1.expand.conv."),
    (SIGHT + r"bn1\.", r"\1.expand.norm."),
    (SIGHT + r"conv_pwl\.", r"\1.project.conv."),
    (SIGHT + r"bn2\.", r"\1.project.norm."),
    (SIGHT + r"dw_start\.", r"\1.start."),
    (SIGHT + r"pw_exp\.", r"\1.expand."),
    (SIGHT + r"dw_mid\.", r"\1.middle."),
    (SIGHT + r"pw_proj\.", r"\1.project."),
    (SIGHT + r"layer_scale\.gamma$", r"\1.scale"),
    (SIGHT + r"attn\.query\.proj\.", r"\1.query."),
    (SIGHT + r"attn\.output\.proj\.", r"\1.out."),
    (SIGHT + r"attn\.(key|value)\.down_conv\.", r"\1.\2.down.conv."),
    (SIGHT + r"attn\.(key|value)\.norm\.", r"\1.\2.down.norm."),
    (SIGHT + r"attn\.(key|value)\.proj\.", r"\1.\2.proj."),
)
AUDIO_RENAME: tuple[Rename, ...] = (
    (r"^(model\.)?audio_tower\.conformer\.", "towers.audio.layers."),
    (
        r"^(model\.)?audio_tower\.subsample_conv_projection\.input_proj_linear\.",
        "towers.audio.project.",
    ),
    (
        r"^(model\.)?audio_tower\.subsample_conv_projection\.conv_0\.(conv\.)?",
        "towers.audio.first.",
    ),
    (
        r"^(model\.)?audio_tower\.subsample_conv_projection\.conv_1\.(conv\.)?",
        "towers.audio.second.",
    ),
    (HEARING + r"ffw_layer_start\.", r"\1.first."),
    (HEARING + r"ffw_layer_end\.", r"\1.second."),
    (HEARING + r"(first|second)\.ffw_layer_1\.", r"\1.\2.up.linear."),
    (HEARING + r"(first|second)\.ffw_layer_2\.", r"\1.\2.down.linear."),
    (HEARING + r"(first|second|lconv1d)\.(pre|post)_layer_norm\.", r"\1.\2.\3_norm."),
    (HEARING + r"attention\.pre_attn_norm\.", r"\1.attention_norm."),
    (HEARING + r"attention\.post_norm\.", r"\1.attention_post_norm."),
    (HEARING + r"attention\.post\.", r"\1.attention.o.linear."),
    (HEARING + r"attention\.attn\.([qkv])_proj\.", r"\1.attention.\2.linear."),
    (
        HEARING + r"attention\.attn\.relative_position_embedding\.pos_proj\.",
        r"\1.attention.distance.",
    ),
    (HEARING + r"attention\.attn\.", r"\1.attention."),
    (HEARING + r"lconv1d\.linear_(start|end)\.", r"\1.convolution.\2.linear."),
    (HEARING + r"lconv1d\.depthwise_conv1d\.", r"\1.convolution."),
    (HEARING + r"lconv1d\.conv_norm\.", r"\1.convolution.norm."),
    (HEARING + r"lconv1d\.", r"\1.convolution."),
)
GEMMA3N_RENAME: tuple[Rename, ...] = (
    *VISION_RENAME,
    *AUDIO_RENAME,
    (EMBEDDER + r"embedding\.", r"towers.embed_\2.table."),
    (EMBEDDER + r"hard_embedding_norm\.", r"towers.embed_\2.token_norm."),
    (EMBEDDER + r"soft_embedding_norm\.", r"towers.embed_\2.media_norm."),
    (EMBEDDER + r"embedding_projection\.", r"towers.embed_\2.project."),
    *GEMMA_RENAME,
    (r"^decoder\.embed_tokens_per_layer\.", "decoder.layer_inputs.table."),
    (r"^decoder\.per_layer_model_projection\.", "decoder.layer_inputs.project."),
    (r"^decoder\.per_layer_projection_norm\.", "decoder.layer_inputs.norm."),
    (r"^decoder\.altup_projections\.(\d+)\.weight$", r"decoder.streams.spread.weight[\1]"),
    (r"^decoder\.altup_unembed_projections\.", "decoder.streams.gather."),
    (r"\.altup\.correct_output_scale$", ".update.scale"),
    (r"\.altup\.correction_coefs\.", ".update.correct."),
    (r"\.altup\.prediction_coefs\.", ".update.predict."),
    (r"\.altup\.modality_router\.", ".update.router."),
    (r"\.altup\.router_norm\.", ".update.norm."),
    (r"\.laurel\.linear_left\.", ".shortcut.down."),
    (r"\.laurel\.linear_right\.", ".shortcut.up."),
    (r"\.laurel\.post_laurel_norm\.", ".shortcut.norm."),
    (r"\.per_layer_input_gate\.", ".input_gate."),
    (r"\.per_layer_projection\.", ".input_out."),
    (r"\.post_per_layer_input_norm\.", ".input_norm."),
)
