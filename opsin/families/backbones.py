"""The text decoders that other models are built upon, chosen by a text config's `model_type`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from opsin.checkpoint.safetensors import StoredTensor
from opsin.checkpoint.weights import renamed
from opsin.decoder.config import AttentionConfig, DecoderConfig
from opsin.errors import CheckpointError
from opsin.families.base import Family
from opsin.families.llama_shape import expert_config, llama_decoder, with_experts

# What published configs leave out, because it is the default of the text model's own config.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
}
DEFAULTS = {
    **DEFAULTS,
    "granite": {**DEFAULTS["llama"], "attention_multiplier": 1.0},
    "ministral3": {
        **DEFAULTS["mistral"],
        "vocab_size": 131072,
        "num_hidden_layers": 34,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    "internlm2": {**DEFAULTS["llama"], "vocab_size": 103168, "bias": True},
    "internlm3": {**DEFAULTS["llama"], "vocab_size": 128512, "max_position_embeddings": 32768},
    "phi3": {
        **DEFAULTS["llama"],
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "qwen3": {**DEFAULTS["qwen2"], "head_dim": 128},
    "qwen3_moe": {
        **DEFAULTS["qwen2"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
}

# Facts that no key of the text config states.
FACTS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": {"qkv_bias": True, "out_bias": False},
    "qwen3": {"qk_norm": "rms"},
    "qwen3_moe": {"qk_norm": "rms"},
}


def backbone(text: Mapping[str, Any], *, tied: bool) -> DecoderConfig:
    """The decoder of a text config.

    Raises CheckpointError for a `model_type` that is none of `DEFAULTS`.
    """
    kind = text.get("model_type", "llama")
    if kind not in DEFAULTS:
        raise CheckpointError(
            f"The checkpoint's text model is of type {kind!r}",
            why=f"this family takes {', '.join(DEFAULTS)}",
            remedy="Choose a checkpoint of this family with one of those",
        )
    filled = respelled({**DEFAULTS[kind], **text})
    facts = {"qkv_bias": filled["qkv_bias"]} if "qkv_bias" in filled else FACTS.get(kind, {})
    decoder = llama_decoder(filled, tied=tied, **facts)
    if "num_experts" in filled:
        moe = dataclasses.replace(expert_config(filled), normalise=filled["norm_topk_prob"])
        decoder = with_experts(decoder, moe, expert_layers(filled))
    if "attention_multiplier" in filled:
        decoder = multiplied(decoder, filled)
    beta = (filled.get("rope_parameters") or {}).get("llama_4_scaling_beta")
    if beta:
        every = float(filled["rope_parameters"]["original_max_position_embeddings"])
        decoder = with_attention(decoder, temperature=(every, float(beta), 0.0))
    return decoder


def respelled(text: Mapping[str, Any]) -> dict[str, Any]:
    """A text config in the commonest keys, where it is written in others."""
    found = dict(text)
    if "bias" in text and text.get("model_type") == "internlm3":
        found["mlp_bias"] = text["bias"]
    if "bias" in text:
        found["attention_bias"] = text["bias"]
    original = text.get("original_max_position_embeddings")
    scaling = text.get("rope_parameters") or text.get("rope_scaling")
    if original and scaling:
        found["rope_parameters"] = {
            "original_max_position_embeddings": original,
            "rope_theta": text.get("rope_theta", 10000.0),
            "partial_rotary_factor": text.get("partial_rotary_factor", 1.0),
            **scaling,
        }
    return found


def expert_layers(text: Mapping[str, Any]) -> set[int]:
    """The layers of a Qwen text config that have experts."""
    step, dense = text.get("decoder_sparse_step", 1), text.get("mlp_only_layers") or ()
    return {i for i in range(text["num_hidden_layers"]) if i not in dense and (i + 1) % step == 0}


def with_attention(decoder: DecoderConfig, **changes: Any) -> DecoderConfig:
    """A decoder with some facts about its attention changed."""
    layers = []
    for layer in decoder.layers:
        assert isinstance(layer.attention, AttentionConfig)
        attention = dataclasses.replace(layer.attention, **changes)
        layers.append(dataclasses.replace(layer, attention=attention))
    return dataclasses.replace(decoder, layers=tuple(layers))


def multiplied(decoder: DecoderConfig, text: Mapping[str, Any]) -> DecoderConfig:
    """A decoder with Granite's factors, but the last: models with a tower leave the logits be."""
    factor = float(text.get("residual_multiplier", 1.0))
    decoder = with_attention(decoder, scale=float(text["attention_multiplier"]))
    return dataclasses.replace(
        decoder,
        layers=tuple(dataclasses.replace(layer, residual_scale=factor) for layer in decoder.layers),
        embedding_scale=float(text.get("embedding_multiplier", 1.0)),
    )


class BackboneFamily(Family):
    """A family whose decoder is one of these, as its `text_config` says.

    `tied_default` holds where neither config says whether the head is the embedding table. A head
    that the checkpoint stores is used, whatever its configs say.
    """

    tied_default: ClassVar[bool] = False
    stores_head: bool | None = None

    def inspect(self, tensors: Sequence[StoredTensor]) -> None:
        names = (renamed(tensor.name, self.rename) for tensor in tensors)
        self.stores_head = "decoder.head.weight" in names

    def tied(self) -> bool:
        """Whether the head is the embedding table."""
        outer = self.config.get("tie_word_embeddings")
        inner = self.text_config.get("tie_word_embeddings")
        stated = [bool(value) for value in (outer, inner) if value is not None]
        if not stated and self.stores_head is not None:
            return not self.stores_head
        return (any(stated) if stated else self.tied_default) and not self.stores_head

    def decoder(self) -> DecoderConfig:
        return backbone(self.text_config, tied=self.tied())

    @property
    def media_scale(self) -> float:
        """The factor on a medium's embeddings, where the decoder scales whatever comes in."""
        return float(self.text_config.get("embedding_multiplier", 1.0))
