"""`opsin models inspect` on every family's checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from opsin.cli.models import inspection

from .checkpoints import Case
from .conftest import Lab
from .test_families import is_ported
from .zoo import CASES, each


@pytest.fixture(params=each(case for case in CASES if is_ported(case)), ids=str)
def lab(request: pytest.FixtureRequest, labs: Callable[[Case], Lab]) -> Lab:
    """The lab of each ported family's cases, one after another."""
    return labs(request.param)


def test_a_checkpoint_is_described_without_its_weights(lab: Lab) -> None:
    model = lab.ours.model
    found = inspection(str(lab.published), None, ["640x480"], 1024)
    assert found["parameters"] == model.num_parameters
    assert found["takes"] == ["text", *model.family.modalities]
    tokens = found["image_tokens"]
    assert (tokens["640x480"] > 0) if lab.case.images else (tokens == {})
