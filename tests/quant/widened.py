"""Tiny checkpoints with matrices wide enough for whole groups of columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tests.families.checkpoints import Case
from tests.families.zoo import CASES

# What grows with the width; heads do, so that their own sizes stay.
FACTOR = 4
INNER = {"intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"}
WIDE = INNER | {
    "attention_heads",
    "d_model",
    "embed_dim",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "hidden_size",
    "hidden_size_per_layer_input",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "num_attention_heads",
    "num_heads",
    "num_key_value_heads",
    "out_hidden_size",
    "projection_dim",
    "resampler_n_heads",
}
# Families whose widths are wide enough, or depend on each other in other ways.
AS_THEY_ARE = {"deepseek_vl_v2", "molmo", "phi3_v", "phi4-siglip"}


def widened(name: str) -> Case:
    """The case of a name with every width four times as large, inner ones in whole groups."""
    case = next(case for case in CASES if case.name == name)
    if case.family in AS_THEY_ARE:
        return case
    config = _wide(case.config)
    if case.family == "llama4":  # its encoder's widths depend on each other in other ways
        config["vision_config"] = case.config["vision_config"]
    if case.family == "mllama":
        vision = config["vision_config"]
        vision["vision_output_dim"] = 3 * vision["hidden_size"]
    return dataclasses.replace(case, config=config)


def _wide(config: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            out[name] = _wide(value)
        elif name in WIDE and isinstance(value, int):
            size = FACTOR * value
            out[name] = -(-size // 64) * 64 if name in INNER else size
        else:
            out[name] = value
    return out
