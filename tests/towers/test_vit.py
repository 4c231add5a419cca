"""The vision transformer takes any number of pictures, a few at a time, with the same result."""

from __future__ import annotations

import pytest
import torch

from opsin.kernels import Kernels
from opsin.towers import vit
from opsin.towers.vit import VisionLayout, VisionTransformer, ViTConfig, axial_angles

LENGTHS = [6, 20, 9, 9, 4, 30]


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("limit", [1, 16, 29, 1000])
def test_groups_of_pictures_give_what_all_at_once_do(
    monkeypatch: pytest.MonkeyPatch, class_token: bool, limit: int
) -> None:
    torch.manual_seed(0)
    config = ViTConfig(12, 32, 3, 4, 48, class_token=class_token)
    tower = VisionTransformer(Kernels(), config)
    for parameter in tower.parameters():
        parameter.data.normal_(0, 0.2)
    tokens = sum(LENGTHS) + class_token * len(LENGTHS)
    layout = VisionLayout(
        LENGTHS,
        position_embeds=torch.randn(tokens, 32),
        angles=axial_angles(torch.randint(0, 9, (tokens, 2)), 8, 100.0),
    )
    patches = torch.randn(sum(LENGTHS), 12)
    whole, whole_taps = tower(patches, layout, (0, 2))
    seen: list[int] = []
    enter = tower._enter
    monkeypatch.setattr(tower, "_enter", lambda p, part: (seen.append(len(p)), enter(p, part))[1])
    monkeypatch.setattr(vit, "GROUP_PATCHES", limit)
    features, taps = tower(patches, layout, (0, 2))
    assert sum(seen) == sum(LENGTHS)
    assert all(count <= limit or count in LENGTHS for count in seen)
    assert len(seen) == {1: 6, 16: 5, 29: 3, 1000: 1}[limit]
    torch.testing.assert_close(features, whole)
    for tap, expected in zip(taps, whole_taps, strict=True):
        torch.testing.assert_close(tap, expected)


def test_a_weight_is_let_go_when_all_groups_are_past_its_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    tower = VisionTransformer(Kernels(), ViTConfig(12, 32, 3, 4, 48))
    for parameter in tower.parameters():
        parameter.data.normal_(0, 0.2)
    seen: list[str] = []
    for i, layer in enumerate(tower.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: seen.append(f"layer {i}"))
        release = lambda i=i: seen.append(f"release {i}")  # noqa: E731
        monkeypatch.setattr(layer.mlp.up, "mapped", object())
        monkeypatch.setattr(layer.mlp.up, "release", release)
    tower(torch.randn(60, 12), VisionLayout([20] * 3))
    assert seen == [f"layer {i}" for i in range(3)], "one group: it is wanted again soon"
    seen.clear()
    monkeypatch.setattr(vit, "GROUP_PATCHES", 20)
    tower(torch.randn(60, 12), VisionLayout([20] * 3))
    steps = [[f"layer {i}"] * 3 + [f"release {i}"] for i in range(3)]
    assert seen == [name for step in steps for name in step]
