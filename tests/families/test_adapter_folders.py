"""Adapters in folders beside the weights, as checkpoints that Transformers saved carry them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from opsin.engine.model import load_model
from opsin.errors import CheckpointError

from .ours import Ours, answers, tokens
from .scenes import scenes
from .test_adapters import RANKS, folders  # noqa: F401 (a fixture)
from .zoo import phi


def write_adapter(folder: Path, name: str, within: Path, **settings: Any) -> None:
    """One adapter in PEFT's layout, taken out of the authors' weights."""
    folder.mkdir()
    rank, alpha = RANKS[name]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mine = {
        f"base_model.model.{key.replace(f'.{name}.', '.')}": value
        for key, value in load_file(within / "model.safetensors").items()
        if f".{name}.weight" in key and ".lora_" in key
    }
    save_file(mine, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def beside(folders: dict[str | None, Path], tmp_path: Path) -> Path:  # noqa: F811
    """Transformers' layout with both adapters in folders."""
    target = tmp_path / "beside"
    shutil.copytree(folders["plain"], target)
    for name in RANKS:
        write_adapter(target / f"{name}-lora", name, folders[None])
    return target


def test_they_are_read(beside: Path, folders: dict[str | None, Path]) -> None:  # noqa: F811
    case = phi.CASES[0]
    ours, authors = Ours(case, beside), Ours(case, folders[None])
    asked = [
        scene for scene in scenes(case) if scene.name in ("text", "one", "mixed", "sound", "sounds")
    ]
    found = []
    for one in (ours, authors):
        with one.engine(step=64) as engine:
            batch = answers(engine, [one.prompt(scene) for scene in asked], count=16)
        found.append([tokens(events) for events in batch])
    assert found[0] == found[1]
    names = set(ours.model.state_dict())
    assert names == set(authors.model.state_dict())


def test_the_authors_folders_hold_what_their_weights_do(
    folders: dict[str | None, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The published layout has both; the weights' own are taken, and nothing is lost."""
    target = tmp_path / "published"
    shutil.copytree(folders[None], target)
    for name in RANKS:
        (target / f"{name}-lora").mkdir()
        (target / f"{name}-lora" / "adapter_config.json").write_text("{}")
    assert load_model(target).decoder.config.adapters


def test_what_cannot_be_read_is_named(beside: Path, folders: dict[str | None, Path]) -> None:  # noqa: F811
    write_adapter(beside / "own-lora", "vision", folders[None])
    with pytest.raises(CheckpointError, match="own-lora"):
        load_model(beside)
    shutil.rmtree(beside / "own-lora")
    shutil.rmtree(beside / "vision-lora")
    with pytest.raises(CheckpointError, match="no vision-lora"):
        load_model(beside)
    write_adapter(beside / "vision-lora", "vision", folders[None], use_dora=True)
    with pytest.raises(CheckpointError, match="use_dora"):
        load_model(beside)
    (beside / "vision-lora" / "adapter_config.json").write_text(json.dumps({"r": 4}))
    with pytest.raises(CheckpointError, match="lora_alpha"):
        load_model(beside)
    shutil.rmtree(beside / "vision-lora")
    write_adapter(beside / "vision-lora", "vision", folders[None])
    (beside / "vision-lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        load_model(beside)
