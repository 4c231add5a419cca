"""MobileNet-V5 against timm's, which the reference class runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opsin import kernels
from opsin.checkpoint.weights import renamed
from opsin.families.gemma3n_names import VISION_RENAME
from opsin.towers.mobilenet_v5 import MobileNetV5, mobilenet_v5_300m
from tests.families.torchvision_operators import declare

PREFIX = "model.vision_tower.timm_model."
KERNELS = kernels.select(torch.device("cpu"))


def timm_model(**settings: float) -> nn.Module:
    """timm's encoder; the test is skipped where it is not installed."""
    if not declare():
        pytest.skip("torchvision is not installed")
    timm = pytest.importorskip("timm")
    model: nn.Module = timm.create_model("mobilenetv5_300m_enc", **settings)
    return model.eval()


def published(model: nn.Module) -> dict[str, torch.Tensor]:
    """Its weights by the names that rename rules give them."""
    return {
        renamed(PREFIX + name, VISION_RENAME).removeprefix("towers.vision."): tensor
        for name, tensor in model.state_dict().items()
    }


def test_every_weight_of_the_true_size_has_its_place() -> None:
    with torch.device("meta"):
        theirs = published(timm_model())
        ours = MobileNetV5(KERNELS, mobilenet_v5_300m()).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].numel() == theirs[name].numel() for name in ours)
    assert sum(tensor.numel() for tensor in ours.values()) == pytest.approx(294e6, rel=0.01)


@pytest.mark.parametrize("width", [0.0625, 0.1])
def test_features_are_timm_s_at_sizes_that_fit_and_sizes_that_do_not(width: float) -> None:
    torch.manual_seed(3)
    theirs = timm_model(channel_multiplier=width, msfa_output_resolution=4)
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    ours = MobileNetV5(KERNELS, mobilenet_v5_300m(width, 4))
    for name, tensor in published(theirs).items():
        ours.get_parameter(name).data.copy_(tensor.view(ours.get_parameter(name).shape))
    # As large as the result, twice and three times that, and of shapes between.
    for height, width in ((64, 64), (128, 128), (192, 192), (96, 96), (100, 60)):
        pixels = torch.rand(2, 3, height, width)
        with torch.no_grad():
            expected = theirs(pixels).flatten(2).transpose(1, 2)
        error = (ours(pixels) - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, (height, width)
