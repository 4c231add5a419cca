"""BART's encoder and decoder (arXiv:1910.13461): config keys and weight names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from opsin.checkpoint.weights import Rename
from opsin.decoder.config import (
    AttentionConfig,
    CrossAttentionConfig,
    DecoderConfig,
    LayerConfig,
    PlainMLPConfig,
)
from opsin.families.llama_shape import ACTIVATIONS
from opsin.towers.text_encoder import TextEncoderConfig

BART_DEFAULTS: dict[str, Any] = {
    "activation_function": "gelu",
    "d_model": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "max_position_embeddings": 1024,
    "decoder_start_token_id": 2,
}
POSITION_OFFSET = 2  # rows of the position tables that stand for no position
EPS = 1e-5
_TEXT = r"^(model\.language_model|language_model\.model)\."


def _attends(match: re.Match[str]) -> str:
    """A decoder layer is two of ours: the first attends to the text, the second to the source."""
    return f"decoder.layers.{2 * int(match[1])}."


def _reads(match: re.Match[str]) -> str:
    return f"decoder.layers.{2 * int(match[1]) + 1}."


BART_RENAME: tuple[Rename, ...] = (
    (_TEXT + r"shared\.", "decoder.embedding."),
    (_TEXT + r"encoder\.", "towers.encoder."),
    (_TEXT + r"decoder\.", "decoder."),
    (r"^(language_model\.)?lm_head\.", "decoder.head."),
    (r"^(language_model\.)?final_logits_bias$", "decoder.head_bias"),
    (r"^(decoder|towers\.encoder)\.embed_positions\.", r"\1.positions."),
    (r"^(decoder|towers\.encoder)\.layernorm_embedding\.", r"\1.embedding_norm."),
    (r"^decoder\.layers\.(\d+)\.(?=self_attn)", _attends),
    (r"^decoder\.layers\.(\d+)\.(?=encoder_attn|fc\d|final_layer_norm)", _reads),
    (r"\.(self|encoder)_attn_layer_norm\.", ".attention_norm."),
    (r"\.final_layer_norm\.", ".mlp_norm."),
    (r"\.self_attn\.q_proj\.(\w+)$", r".attention.qkv.\1[0]"),
    (r"\.self_attn\.k_proj\.(\w+)$", r".attention.qkv.\1[1]"),
    (r"\.self_attn\.v_proj\.(\w+)$", r".attention.qkv.\1[2]"),
    (r"\.encoder_attn\.q_proj\.", ".attention.query."),
    (r"\.encoder_attn\.k_proj\.(\w+)$", r".attention.source.\1[0]"),
    (r"\.encoder_attn\.v_proj\.(\w+)$", r".attention.source.\1[1]"),
    (r"\.(self|encoder)_attn\.out_proj\.", ".attention.out."),
    (r"^(decoder|towers\.encoder)\.layers\.(\d+)\.fc1\.", r"\1.layers.\2.mlp.up."),
    (r"^(decoder|towers\.encoder)\.layers\.(\d+)\.fc2\.", r"\1.layers.\2.mlp.down."),
)
# Both sides look tokens up in the one shared table.
BART_IGNORED = (r"\.(encoder|decoder)\.embed_tokens\.weight$",)


def bart_decoder(text: Mapping[str, Any], *, tied: bool, head_bias: bool) -> DecoderConfig:
    """The decoder that a text config in BART's keys describes."""
    hidden, heads = text["d_model"], text["decoder_attention_heads"]
    shape = {"heads": heads, "kv_heads": heads, "head_dim": hidden // heads}
    attention = AttentionConfig(**shape, rope=None, qkv_bias=True, out_bias=True)
    mlp = PlainMLPConfig(text["decoder_ffn_dim"], ACTIVATIONS[text["activation_function"]])
    pair = (
        LayerConfig(attention, None, sum_norms=True),
        LayerConfig(CrossAttentionConfig(**shape, bias=True), mlp, sum_norms=True),
    )
    positions = text["max_position_embeddings"]
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        hidden=hidden,
        layers=pair * text["decoder_layers"],
        max_positions=positions,
        norm="layer",
        norm_eps=EPS,
        tied_head=tied,
        embedding_scale=hidden**0.5 if text.get("scale_embedding") else 1.0,
        learned_positions=(positions + POSITION_OFFSET, POSITION_OFFSET),
        embedding_norm=True,
        final_norm=False,
        head_bias=head_bias,
    )


def bart_encoder(text: Mapping[str, Any]) -> TextEncoderConfig:
    """The encoder that a text config in BART's keys describes."""
    return TextEncoderConfig(
        hidden=text["d_model"],
        layers=text["encoder_layers"],
        heads=text["encoder_attention_heads"],
        mlp_hidden=text["encoder_ffn_dim"],
        positions=text["max_position_embeddings"] + POSITION_OFFSET,
        offset=POSITION_OFFSET,
        activation=ACTIVATIONS[text["activation_function"]],
        norm_eps=EPS,
    )
