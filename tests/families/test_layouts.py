"""Checkpoints republished by MLX store a tower's patch convolution with its colours last."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsin.engine.model import load_model

from .checkpoints import Case
from .conftest import Lab
from .zoo import CASES


@pytest.mark.parametrize("name", ["llava-", "qwen2_vl-", "gemma3-"])
def test_colours_may_stand_last(name: str, labs: Callable[[Case], Lab], tmp_path: Path) -> None:
    lab = labs(next(case for case in CASES if case.name.startswith(name)))
    folder = tmp_path / "mlx"
    shutil.copytree(lab.folder, folder)
    weights = load_file(folder / "model.safetensors")
    turned = {key: value for key, value in weights.items() if value.ndim > 3}
    assert turned
    weights.update({key: value.movedim(1, -1).contiguous() for key, value in turned.items()})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    expected, got = load_model(lab.folder).state_dict(), load_model(folder).state_dict()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
