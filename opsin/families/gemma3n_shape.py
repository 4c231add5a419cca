"""Gemma 3n's parts as its configs describe them, and what published configs leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opsin.decoder.config import (
    DecoderConfig,
    LayerInputsConfig,
    MLPConfig,
    SharedAttentionConfig,
    SparseMLPConfig,
    StreamsConfig,
    StreamsLayerConfig,
)
from opsin.errors import CheckpointError
from opsin.families.gemma_shape import gemma_rope
from opsin.families.llama_shape import ACTIVATIONS
from opsin.towers.mel import UniversalMel
from opsin.towers.mobilenet_v5 import MobileNetConfig, mobilenet_v5_300m
from opsin.towers.usm import USMConfig

TEXT: Mapping[str, Any] = {
    "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144,
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "final_logit_softcapping": 30.0,
    "altup_active_idx": 0,
    "altup_correct_scale": True,
    "altup_num_inputs": 4,
    "num_kv_shared_layers": 15,
    "laurel_rank": 64,
}
VISION: Mapping[str, Any] = {
    "architecture": "mobilenetv5_300m_enc",
    "hidden_size": 2048,
    "rms_norm_eps": 1e-6,
    "vocab_offset": 262144,
    "vocab_size": 128,
}
AUDIO: Mapping[str, Any] = {
    "hidden_size": 1536,
    "input_feat_size": 128,
    "rms_norm_eps": 1e-6,
    "vocab_offset": 262272,
    "vocab_size": 128,
    "conf_attention_context_left": 13,
    "conf_attention_context_right": 0,
    "conf_attention_logit_cap": 50.0,
    "conf_conv_kernel_size": 5,
    "conf_num_attention_heads": 8,
    "conf_num_hidden_layers": 12,
    "conf_reduction_factor": 4,
    "conf_residual_weight": 0.5,
    "sscp_conv_channel_size": (128, 32),
    "sscp_conv_group_norm_eps": 1e-3,
    "sscp_conv_kernel_size": ((3, 3), (3, 3)),
    "sscp_conv_stride_size": ((2, 2), (2, 2)),
}
# What the audio tower is built for, whatever a config might state.
AUDIO_FIXED = (
    "input_feat_size",
    "conf_attention_context_right",
    "sscp_conv_kernel_size",
    "sscp_conv_stride_size",
)


def text_shape(stated: Mapping[str, Any]) -> dict[str, Any]:
    """A text config with its defaults, and with one entry a layer where layers may differ."""
    text = {**TEXT, **stated}
    count, width = text["num_hidden_layers"], text["intermediate_size"]
    text["intermediate_size"] = [width] * count if isinstance(width, int) else list(width)
    text["layer_types"] = text.get("layer_types") or [
        "sliding_attention" if (i + 1) % 5 else "full_attention" for i in range(count)
    ]
    sparse = 10 if count > 10 else 0
    text["activation_sparsity_pattern"] = text.get("activation_sparsity_pattern") or (
        [0.95] * sparse + [0.0] * (count - sparse)
    )
    return text


def feeding_layers(text: Mapping[str, Any]) -> dict[str, int]:
    """Of each kind of attention, the layer whose keys and values the last layers read."""
    own = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    return {kind: i for i, kind in enumerate(text["layer_types"][:own])}


def decoder_shape(text: Mapping[str, Any], own_rows: int, *, tied: bool) -> DecoderConfig:
    """The decoder of a text config as `text_shape` gives it."""
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        hidden=text["hidden_size"],
        layers=tuple(layer_shape(text, i) for i in range(text["num_hidden_layers"])),
        max_positions=text["max_position_embeddings"],
        norm_eps=text["rms_norm_eps"],
        tied_head=tied,
        embedding_scale=text["hidden_size"] ** 0.5,
        logit_soft_cap=text["final_logit_softcapping"],
        layer_inputs=LayerInputsConfig(
            text["vocab_size_per_layer_input"], text["hidden_size_per_layer_input"]
        ),
        own_rows=own_rows,
        streams=StreamsConfig(
            count=text["altup_num_inputs"],
            active=text["altup_active_idx"],
            scaled=bool(text["altup_correct_scale"]),
        ),
    )


def layer_shape(text: Mapping[str, Any], index: int) -> StreamsLayerConfig:
    """One layer; the last ones read the keys and values of earlier ones."""
    kind = text["layer_types"][index]
    sliding = kind == "sliding_attention"
    own = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    bias = bool(text.get("attention_bias", False))
    activation = ACTIVATIONS[text["hidden_activation"]]
    width, sparsity = text["intermediate_size"][index], text["activation_sparsity_pattern"][index]
    mlp = MLPConfig(width, activation)
    return StreamsLayerConfig(
        attention=SharedAttentionConfig(
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
            rope=gemma_rope(text, sliding=sliding),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="rms",
            window=text["sliding_window"] if sliding else None,
            scale=1.0,
            shared_from=feeding_layers(text)[kind] if index >= own else None,
        ),
        mlp=SparseMLPConfig(width, activation, sparsity=sparsity) if sparsity else mlp,
        shortcut_rank=text["laurel_rank"],
        input_dim=text["hidden_size_per_layer_input"],
    )


def vision_shape(vision: Mapping[str, Any]) -> MobileNetConfig:
    """The tower that a vision config describes."""
    if vision["architecture"] != VISION["architecture"]:
        raise _unknown(f"its vision tower is a {vision['architecture']}")
    stated = vision.get("model_args") or {}
    return mobilenet_v5_300m(
        stated.get("channel_multiplier", 1.0), stated.get("msfa_output_resolution", 16)
    )


def audio_shape(audio: Mapping[str, Any]) -> USMConfig:
    """The encoder that an audio config describes."""
    for name in AUDIO_FIXED:
        if _plain(audio[name]) != _plain(AUDIO[name]):
            raise _unknown(f"its audio_config states {name} as {audio[name]!r}")
    first, second = audio["sscp_conv_channel_size"]
    return USMConfig(
        hidden=audio["hidden_size"],
        layers=audio["conf_num_hidden_layers"],
        heads=audio["conf_num_attention_heads"],
        channels=(first, second),
        out=0,
        past=max(1, audio["conf_attention_context_left"]),
        kernel=audio["conf_conv_kernel_size"],
        cap=audio["conf_attention_logit_cap"],
        half_step=audio["conf_residual_weight"],
        norm_eps=audio["rms_norm_eps"],
        clipped=False,
        every=audio["conf_reduction_factor"],
        scaled_keys=False,
        running_eps=audio["sscp_conv_group_norm_eps"],
    )


def mel_shape(config: Mapping[str, Any]) -> UniversalMel:
    """The features of sounds that a processor config describes."""
    return UniversalMel(
        frame=512,
        fft=1024 if config.get("fft_overdrive", True) else 512,
        low=config.get("min_frequency", 125.0),
        high=config.get("max_frequency", 7600.0),
        preemphasis=config.get("preemphasis", 0.97),
        floor=config.get("mel_floor", 1e-5),
        least=True,
        centred=False,
        mean=tuple(config.get("per_bin_mean") or ()),
        deviation=tuple(config.get("per_bin_stddev") or ()),
    )


def _plain(value: Any) -> Any:
    """Lists as tuples, which is how defaults are written."""
    return tuple(map(_plain, value)) if isinstance(value, Sequence) else value


def _unknown(why: str) -> CheckpointError:
    return CheckpointError(
        "This checkpoint's towers are of a kind that is not known",
        why=why,
        remedy="Use the config.json that the model's authors published",
    )
