"""What the tensors of MiniCPM-o are called, by its authors and as MLX stores them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from opsin.checkpoint.safetensors import StoredTensor
from opsin.checkpoint.weights import Rename
from opsin.families.clip_shape import CLIP_RENAME
from opsin.families.llama_shape import LLAMA_RENAME
from opsin.families.voxtral import WHISPER_RENAME

MINICPMO_RENAME: tuple[Rename, ...] = (
    (r"^llm\.", "language_model."),
    (r"^vpm\.", "vision_tower."),
    (r"^apm\.", "audio_tower."),
    (r"^audio_projection_layer\.linear1\.", "towers.hearing.up."),
    (r"^audio_projection_layer\.linear2\.", "towers.hearing.down."),
    (r"^resampler\.", "towers.resampler."),
    (r"^(towers\.resampler)\.query$", r"\1.queries"),
    (r"^(towers\.resampler)\.proj$", r"\1.project.weight^T"),
    (r"^(towers\.resampler)\.kv_proj\.", r"\1.inward."),
    (r"^(towers\.resampler)\.ln_q\.", r"\1.query_norm."),
    (r"^(towers\.resampler)\.ln_kv\.", r"\1.feature_norm."),
    (r"^(towers\.resampler)\.ln_post\.", r"\1.post_norm."),
    (r"^(towers\.resampler)\.attn\.q_proj\.", r"\1.query."),
    (r"^(towers\.resampler)\.attn\.k_proj\.", r"\1.key."),
    (r"^(towers\.resampler)\.attn\.v_proj\.", r"\1.value."),
    (r"^(towers\.resampler)\.attn\.out_proj\.", r"\1.out."),
    *WHISPER_RENAME,
    (r"^(towers\.audio\.layers\.\d+)\.self_attn\.q_proj\.(\w+)$", r"\1.attention.qkv.\2[0]"),
    *CLIP_RENAME,
    *LLAMA_RENAME,
)


def resampler_parts(tensor: StoredTensor) -> Sequence[StoredTensor]:
    """The resampler's queries, keys and values, which one stored matrix makes, each alone."""
    found = re.match(r"^(resampler\.attn)\.in_proj_(weight|bias)$", tensor.name)
    if found is None:
        return (tensor,)
    rows = tensor.shape[0] // 3
    size = rows * math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    return [
        replace(
            tensor,
            name=f"{found[1]}.{part}_proj.{found[2]}",
            shape=(rows, *tensor.shape[1:]),
            start=tensor.start + i * size,
        )
        for i, part in enumerate("qkv")
    ]
