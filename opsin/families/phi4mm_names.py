"""What the tensors of Phi-4-multimodal are called, by its authors and by Transformers."""

from __future__ import annotations

from opsin.checkpoint.weights import Rename
from opsin.families.clip_shape import CLIP_RENAME
from opsin.families.llama_shape import LLAMA_RENAME

IMAGE = r"^model\.embed_tokens_extend\.image_embed\."
AUDIO = r"^model\.embed_tokens_extend\.audio_embed\."
BLOCK = r"^(towers\.audio\.layers\.\d+)\."
ADAPTERS = {"vision": 0, "speech": 1}
# The authors' names of what Transformers calls otherwise, in the speech encoder's config.
SPEECH_NAMES = {
    "attention_dim": "hidden_size",
    "attention_heads": "num_attention_heads",
    "depthwise_seperable_out_channel": "depthwise_separable_out_channel",
    "linear_units": "intermediate_size",
    "conv_channels": "nemo_conv_channels",
    "t5_bias_max_distance": "bias_max_distance",
}
NESTED = ("nemo_conv_settings", "relative_attention_bias_args")


def _stage(number: int) -> str:
    """A strided convolution by its number in the encoder's first block."""
    stage, place = divmod(number - 2, 3)
    return f"towers.audio.subsampling.{'point' if place else 'depth'}.{stage}."


PHI4MM_RENAME: tuple[Rename, ...] = (
    (IMAGE + r"img_processor\.", "vision_tower."),
    (IMAGE + r"img_projection(\.0|_up)\.", "towers.image.up."),
    (IMAGE + r"img_projection(\.2|_down)\.", "towers.image.down."),
    (IMAGE + r"(sub_GN|sub_img_feature_extensor)$", "towers.row_end.weight"),
    (IMAGE + r"(glb_GN|global_img_feature_extensor)$", "towers.between.weight"),
    (AUDIO + r"(audio_projection\.speech\.0|up_proj_for_speech)\.", "towers.speech.up."),
    (AUDIO + r"(audio_projection\.speech\.2|down_proj_for_speech)\.", "towers.speech.down."),
    (AUDIO + r"(audio_projection\.vision\.0|up_proj_for_vision_speech)\.", "towers.sight.up."),
    (
        AUDIO + r"(audio_projection\.vision\.2|down_proj_for_vision_speech)\.",
        "towers.sight.down.",
    ),
    (AUDIO + r"encoder\.encoder_embedding\.global_mean$", "towers.audio.mean"),
    (AUDIO + r"encoder\.encoder_embedding\.global_invstd$", "towers.audio.inverse_deviation"),
    (AUDIO + r"encoder\.relative_attention_bias_layer\.bias_values\.", "towers.audio.distances."),
    (AUDIO + r"encoder\.embed\.conv\.0\.", "towers.audio.subsampling.first."),
    (AUDIO + r"encoder\.embed\.conv\.(\d+)\.", lambda found: _stage(int(found[1]))),
    (AUDIO + r"encoder\.embed\.out\.", "towers.audio.subsampling.out."),
    (AUDIO + r"encoder\.encoders\.", "towers.audio.layers."),
    (BLOCK + r"feed_forward_in\.", r"\1.first."),
    (BLOCK + r"feed_forward_out\.", r"\1.second."),
    (BLOCK + r"(first|second)\.layer_norm\.", r"\1.\2.norm."),
    (BLOCK + r"(first|second)\.(net\.0\.linear|gate_up_proj)\.", r"\1.\2.up_gate."),
    (BLOCK + r"(first|second)\.(net\.2|down_proj)\.", r"\1.\2.down."),
    (BLOCK + r"self_attn\.(linear_q|q_proj)\.(\w+)$", r"\1.qkv.\3[0]"),
    (BLOCK + r"self_attn\.(linear_k|k_proj)\.(\w+)$", r"\1.qkv.\3[1]"),
    (BLOCK + r"self_attn\.(linear_v|v_proj)\.(\w+)$", r"\1.qkv.\3[2]"),
    (BLOCK + r"self_attn\.(linear_out|o_proj)\.", r"\1.out."),
    (BLOCK + r"conv\.layer_norm\.", r"\1.convolution.norm."),
    (BLOCK + r"conv\.glu\.ext_pw_conv_1d\.", r"\1.convolution.up_gate."),
    (BLOCK + r"conv\.glu\.b1$", r"\1.convolution.up_bias"),
    (BLOCK + r"conv\.glu\.b2$", r"\1.convolution.gate_bias"),
    (BLOCK + r"conv\.dw_sep_conv_1d\.dw_conv\.", r"\1.convolution.depth."),
    (BLOCK + r"conv\.dw_sep_conv_1d\.pw_conv\.", r"\1.convolution.point."),
    (BLOCK + r"conv\.ext_pw_conv_1d\.", r"\1.convolution.out."),
    (BLOCK + r"layer_norm_att\.", r"\1.attention_norm."),
    (BLOCK + r"layer_norm\.", r"\1.norm."),
    *CLIP_RENAME,
    (r"\.base_layer\.", "."),
    (
        r"\.lora_(A|B)\.(vision|speech)\.",
        lambda found: f".adapters.{ADAPTERS[found[2]]}.{'down' if found[1] == 'A' else 'up'}.",
    ),
    (r"\.self_attn\.qkv_proj\.", ".attention.qkv."),
    (r"\.mlp\.gate_up_proj\.", ".mlp.gate_up."),
    *LLAMA_RENAME,
)
