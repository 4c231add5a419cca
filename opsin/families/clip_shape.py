"""The commonest towers (CLIP, SigLIP and their kin): config keys, weight names, square tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from opsin.checkpoint.weights import Rename
from opsin.errors import CheckpointError
from opsin.families.llama_shape import ACTIVATIONS
from opsin.towers import pixels
from opsin.towers.vit import VisionLayout, VisionTransformer, ViTConfig

CLIP_RENAME: tuple[Rename, ...] = (
    (r"^(model\.)?(vision_tower|vision_model)\.(vision_model\.)?", "towers.vision."),
    (r"^towers\.vision\.embeddings\.class_embedding$", "towers.vision.class_token"),
    (r"^towers\.vision\.embeddings\.patch_embedding\.", "towers.vision.patch."),
    (r"^towers\.vision\.embeddings\.position_embedding\.", "towers.vision.positions."),
    (r"^towers\.vision\.pre_layrnorm\.", "towers.vision.pre_norm."),
    (r"^towers\.vision\.post_layernorm\.", "towers.vision.post_norm."),
    (r"^towers\.vision\.encoder\.layers\.", "towers.vision.layers."),
    (r"^(towers\.vision\.layers\.\d+)\.layer_norm1\.", r"\1.attention_norm."),
    (r"^(towers\.vision\.layers\.\d+)\.layer_norm2\.", r"\1.mlp_norm."),
    (r"^(towers\.vision\.layers\.\d+)\.self_attn\.out_proj\.", r"\1.attention.out."),
    (r"^(towers\.vision\.layers\.\d+)\.mlp\.fc1\.", r"\1.mlp.up."),
    (r"^(towers\.vision\.layers\.\d+)\.mlp\.fc2\.", r"\1.mlp.down."),
)

# Buffers that old checkpoints store, and the pooling head that no decoder sees.
CLIP_IGNORED = (r"\.embeddings\.position_ids$", r"^(model\.)?vision_\w+\.(vision_model\.)?head\.")
POST_NORM = r"^(model\.)?vision_\w+\..*post_layernorm\."

_SHARED = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
_NAVIT = {**_SHARED, "patch_size": 32, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_WIDE = {**_NAVIT, "hidden_size": 1152, "num_attention_heads": 16}
# What published configs leave out, by the vision config's `model_type`.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": {
        **_SHARED,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip_vision_model": {**_NAVIT, "patch_size": 16},
    "idefics2": _NAVIT,
    "idefics2_vision": _NAVIT,
    "idefics3": _WIDE,
    "idefics3_vision": _WIDE,
    "smolvlm_vision": _WIDE,
    "pixtral": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 1024,
        "patch_size": 16,
        "hidden_act": "gelu",
    },
}


def with_defaults(vision: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A vision config with what it leaves out; `kind` is the `model_type` if it states none.

    Raises CheckpointError for a tower that is none of `DEFAULTS`.
    """
    stated = vision.get("model_type", kind)
    if stated not in DEFAULTS:
        raise CheckpointError(
            f"The checkpoint's tower is of type {stated!r}",
            why=f"this family takes {', '.join(DEFAULTS)}",
            remedy="Choose a checkpoint of this family with one of those",
        )
    return {**DEFAULTS[stated], "model_type": stated, **vision}


def one_side(size: int | Sequence[int]) -> int:
    """A size that may be written as one number or as a pair."""
    return size if isinstance(size, int) else size[0]


def clip_config(
    vision: Mapping[str, Any], *, layers: int | None = None, post_norm: bool = False
) -> ViTConfig:
    """The tower of a vision config that is complete, with its first `layers` layers or all."""
    clip = vision.get("model_type") == "clip_vision_model"
    patch = one_side(vision["patch_size"])
    side = one_side(vision["image_size"]) // patch
    return ViTConfig(
        patch_dim=vision.get("num_channels", 3) * patch**2,
        hidden=vision["hidden_size"],
        layers=vision["num_hidden_layers"] if layers is None else layers,
        heads=vision["num_attention_heads"],
        mlp_hidden=vision["intermediate_size"],
        activation=ACTIVATIONS[vision["hidden_act"]],
        norm_eps=vision["layer_norm_eps"],
        patch_bias=not clip,
        positions=side**2 + clip,
        class_token=clip,
        pre_norm=clip,
        post_norm=post_norm,
    )


def layer_counts(selected: int | Sequence[int], layers: int) -> list[int]:
    """After how many layers each selected hidden state stands; negative ones count from the end."""
    chosen = [selected] if isinstance(selected, int) else selected
    return [index if index >= 0 else layers + 1 + index for index in chosen]


def later_layers(used: int, layers: int) -> tuple[str, ...]:
    """Patterns of the weights of tower layers after the first `used`."""
    numbers = "|".join(str(index) for index in range(used, layers))
    return (rf"^(model\.)?vision_.*\.layers\.({numbers})\.",) if numbers else ()


def tile_features(
    tower: VisionTransformer,
    tiles: Tensor,
    patch: int,
    *,
    merge: int = 1,
    positions: Tensor | None = None,
    counts: Sequence[int] = (),
    levels: pixels.Normalisation | None = None,
    then: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Features of equally large tiles (tiles, channels, height, width): (tiles, patches, width).

    `merge` keeps blocks of patches together. `positions` are the rows of the position table that a
    tile's patches take, all in order by default. `counts` selects the states after so many layers,
    side by side; without them it is the tower's result. Tiles of type uint8 are normalised by
    `levels`. A few tiles go through at a time, so that only their pixels are copied; `then` makes
    of the features (patches, width) of some of them what is returned instead, without `counts`.
    """
    assert then is None or not counts, "the states after layers are kept as they are"
    per_tile = math.prod(tiles.shape[-2:]) // patch**2
    parts = tiles.split(max(1, tower.group_patches // per_tile))
    groups = (_group(tower, part, patch, merge, positions, levels) for part in parts)
    features, tapped = tower.in_groups(groups, tuple(count - 1 for count in counts), then)
    chosen = torch.cat(tapped, dim=-1) if tapped else features
    return chosen.unflatten(0, (len(tiles), -1))


def _group(
    tower: VisionTransformer,
    tiles: Tensor,
    patch: int,
    merge: int,
    positions: Tensor | None,
    levels: pixels.Normalisation | None,
) -> tuple[Tensor, VisionLayout]:
    """The patches of some tiles, and how they lie."""
    tiles = tiles.to(tower.patch.weight.device)
    if tiles.dtype == torch.uint8:
        assert levels is not None, "levels mean nothing by themselves"
        tiles = pixels.normalised_frames(tiles, *levels)
    cut = pixels.patchify(tiles.to(tower.patch.weight), patch, merge)
    table = tower.positions.weight
    rows = table if positions is None else table[positions.to(table.device)]
    length = len(cut) // len(tiles)
    return cut, VisionLayout([length] * len(tiles), position_embeds=rows.repeat(len(tiles), 1))
