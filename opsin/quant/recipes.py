"""Recipes: how many bits each matrix of a quantised checkpoint gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# name -> (bits of most of the decoder, bits of what is most sensitive)
MIXED: Mapping[str, tuple[int, int]] = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
}
RECIPES = ("uniform", *MIXED, "moqe")
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
LAYOUTS = ("mlx", "hf")
TOWER_BITS = 8
AS_STORED = 0

Kind = Literal["tower", "table", "expert", "linear"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix stands in a model: in an encoder, as embedding or head, or in the decoder.

    layer: its decoder layer of num_layers; sensitive: it makes values, or ends a feed-forward
    block.
    """

    kind: Kind
    layer: int = 0
    num_layers: int = 1
    sensitive: bool = False


def bits_of(recipe: str, place: Place, bits: int) -> int:
    """The bits of a matrix at a place, AS_STORED for none.

    Towers have 8 whatever the recipe. Mixed recipes give more bits to embedding and head, and to
    the sensitive matrices of some layers, as mlx-lm does, after llama.cpp's Q4_K_M. Of moqe only
    the experts are quantised (arXiv:2310.02410).
    """
    if recipe == "moqe":
        return bits if place.kind == "expert" else AS_STORED
    if place.kind == "tower":
        return TOWER_BITS
    if recipe not in MIXED:
        return bits
    low, high = MIXED[recipe]
    if place.kind == "table":
        return high
    return high if place.sensitive and has_more_bits(place.layer, place.num_layers) else low


def has_more_bits(layer: int, num_layers: int) -> bool:
    """Whether a layer is of the first or the last eighth, or every third one between."""
    past = layer - num_layers // 8
    return past < 0 or layer >= 7 * num_layers // 8 or past % 3 == 2


def first_bits(recipe: str, bits: int) -> int:
    """The bits of most matrices: what config.json states for those it does not name."""
    return MIXED[recipe][0] if recipe in MIXED else bits
