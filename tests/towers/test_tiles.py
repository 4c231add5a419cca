"""Tiles are normalised, gathered and encoded in parts, with the result of all at once."""

from __future__ import annotations

import pytest
import torch

from opsin.families.base import MediaInput, features_of
from opsin.families.clip_shape import tile_features
from opsin.kernels import Kernels
from opsin.towers import pixels, vit
from opsin.towers.vit import VisionTransformer, ViTConfig
from tests.families.pictures import picture


def test_tiles_are_normalised_one_by_one() -> None:
    tiles = [picture(seed, 12, 8) for seed in range(3)]
    whole = torch.stack([pixels.normalised(tile, pixels.CLIP_MEAN, pixels.HALF) for tile in tiles])
    shades = pixels.CLIP_MEAN, pixels.HALF
    assert torch.equal(pixels.normalised_tiles(tiles, *shades), whole)
    levels = MediaInput("image", {"x": pixels.levels(tiles)}, "", 1, levels=shades)
    assert levels.features["x"].dtype == torch.uint8
    assert torch.equal(levels.value("x"), whole)
    values = MediaInput("image", {"x": whole}, "", 1, levels=shades)
    assert values.value("x") is whole
    assert torch.equal(features_of([levels, values], "x"), torch.cat((whole, whole)))


def test_the_features_of_one_medium_are_not_copied() -> None:
    one, other = (MediaInput("image", {"x": torch.full((2, 3), i)}, "", 1) for i in (1, 2))
    assert features_of([one], "x") is one.features["x"]
    assert features_of([one, other], "x").tolist() == [[1] * 3] * 2 + [[2] * 3] * 2


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("counts", [(), (1, 2)])
def test_tiles_in_parts_give_what_all_at_once_do(
    monkeypatch: pytest.MonkeyPatch, class_token: bool, counts: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    config = ViTConfig(12, 32, 2, 4, 48, positions=16 + class_token, class_token=class_token)
    tower = VisionTransformer(Kernels(), config)
    for parameter in tower.parameters():
        parameter.data.normal_(0, 0.2)
    tiles = torch.randn(7, 3, 8, 8)
    whole = tile_features(tower, tiles, 2, merge=2, counts=counts)
    seen: list[int] = []
    enter = tower._enter
    monkeypatch.setattr(tower, "_enter", lambda p, part: (seen.append(len(p)), enter(p, part))[1])
    monkeypatch.setattr(vit, "GROUP_PATCHES", 40)  # two and a half tiles
    parts = tile_features(tower, tiles, 2, merge=2, counts=counts)
    assert seen == [32, 32, 32, 16]
    torch.testing.assert_close(parts, whole)


def test_levels_of_tiles_are_normalised_on_their_way() -> None:
    torch.manual_seed(0)
    tower = VisionTransformer(Kernels(), ViTConfig(12, 32, 1, 4, 48, positions=16))
    for parameter in tower.parameters():
        parameter.data.normal_(0, 0.2)
    tiles = [picture(seed, 8, 8) for seed in range(2)]
    shades = pixels.CLIP_MEAN, pixels.HALF
    values = tile_features(tower, pixels.normalised_tiles(tiles, *shades), 2)
    assert torch.equal(tile_features(tower, pixels.levels(tiles), 2, levels=shades), values)
