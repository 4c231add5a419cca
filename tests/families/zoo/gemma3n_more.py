"""A tiny Gemma 3n checkpoint as its authors publish it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from ..checkpoints import Case
from .gemma3n import CASES as TINY

LAYERS, SHARED, SOUND = 5, 2, 40


def _config() -> dict[str, Any]:
    config: dict[str, Any] = copy.deepcopy(dict(TINY[0].config))
    config["text_config"] |= {
        "activation_sparsity_pattern": [0.95, 0.0, 0.5, 0.0, 0.0],
        "altup_correct_scale": False,
        "intermediate_size": [48, 80, 48, 64, 80],
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 3,
        "num_hidden_layers": LAYERS,
        "num_kv_shared_layers": SHARED,
        "sliding_window": 7,
    }
    config["audio_config"] |= {"conf_attention_context_left": 3, "conf_reduction_factor": 2}
    config["audio_soft_tokens_per_image"] = SOUND
    return config


def _with_unused_keys(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers that read other layers' keys and values have weights for own ones all the same."""
    added = {}
    for layer in range(LAYERS - SHARED, LAYERS):
        for part in ("k_proj", "v_proj", "k_norm"):
            name = "model.language_model.layers.{}.self_attn." + part + ".weight"
            added[name.format(layer)] = weights[name.format(0)].clone()
    return {**weights, **added}


def _files(side: int) -> dict[str, Any]:
    files: dict[str, Any] = copy.deepcopy(dict(TINY[0].files))
    files["preprocessor_config.json"]["size"] = {"height": side, "width": side}
    files["processor_config.json"]["audio_seq_length"] = SOUND
    return files


CASES: tuple[Case, ...] = (
    # A picture whose features are four times too many, as the true size's are nine times.
    dataclasses.replace(
        TINY[0],
        variant="pooled",
        seed=2,
        config=_config(),
        files=_files(128),
        repack=_with_unused_keys,
        images=1,
        two_turns=False,
    ),
)
