"""Towers take no memory until a picture comes, and then answer as if they had been read at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import opsin
from opsin.checkpoint import weights
from opsin.engine import packing
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.model import Model
from opsin.errors import EngineError
from opsin.kernels import cpu
from opsin.kernels.packed import DenseMatrix
from opsin.nn.late import LateMatrix
from opsin.nn.linear import Linear
from opsin.towers import vit
from tests.families.checkpoints import write_checkpoint
from tests.families.ours import answers, tokens
from tests.families.pictures import picture
from tests.families.zoo import CASES

CASE = "smolvlm-saved_tied"  # a tower whose queries, keys and values stand in tensors of their own
pytestmark = pytest.mark.skipif(cpu.load() is None, reason=f"not built: {cpu.why_missing()}")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = next(case for case in CASES if case.name == CASE)
    folder = write_checkpoint(case, tmp_path_factory.mktemp("late"))
    path = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(packing, "LEAST_ROWS", 1)
    monkeypatch.setattr(packing, "MAP_BYTES", 1)
    return shutil.copytree(written, tmp_path / "model")


def load(folder: Path, bits: int | None) -> tuple[Model, Any]:
    return opsin.load(folder, device="cpu", dtype="bfloat16", quantize=bits, repacked_cache="off")


def late(model: Model) -> list[LateMatrix]:
    packed = [m.packed for m in model.towers.modules() if isinstance(m, Linear)]
    return [each for each in packed if isinstance(each, LateMatrix)]


def answer(model: Model, prompt: Any) -> tuple[list[int], list[Any]]:
    with Engine(model, None, EngineLimits(memory=1 << 24, block_size=8)) as engine:
        events = answers(engine, [prompt], count=8, logprobs=1)[0]
    return tokens(events), [event.logprobs for event in events]


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_tower_waits_for_a_picture(
    folder: Path, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load(folder, bits)
    assert late(model)
    answer(model, processor.prepare("What?"))
    assert all(each.is_waiting for each in late(model))
    shown = processor.prepare("What is it?", images=[picture(1, 90, 70)])
    seen = answer(model, shown)
    assert not any(each.is_waiting for each in late(model))
    monkeypatch.setattr(packing, "late_matrices", lambda towers: frozenset())
    monkeypatch.setattr("opsin.engine.model.late_matrices", lambda towers: frozenset())
    at_once, _ = load(folder, bits)
    assert not late(at_once)
    assert answer(at_once, shown) == seen, "bit for bit"


def test_a_checkpoint_may_go_before_its_tower_is_used(folder: Path) -> None:
    model, processor = load(folder, 8)
    shown = processor.prepare("What is it?", images=[picture(1, 90, 70)])
    shutil.rmtree(folder)
    assert answer(model, shown)[0]


@pytest.mark.parametrize("bits", [None, 8])
def test_a_file_that_was_cut_short_is_told(folder: Path, bits: int | None) -> None:
    model, _ = load(folder, bits)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(EngineError, match="file end"):
        late(model)[-1].now()
    assert late(model)[-1].is_waiting


def test_a_matrix_that_nothing_packs_is_as_its_tensors(folder: Path) -> None:
    model, _ = load(folder, None)
    for module in model.towers.modules():
        if isinstance(module, Linear) and isinstance(module.packed, LateMatrix):
            matrix = module.packed.now()
            assert isinstance(matrix, DenseMatrix)
            assert matrix.weight.shape == (sum(module.splits), module.packed.k)
            assert matrix.nbytes == matrix.weight.nbytes


@pytest.mark.parametrize("bits", [None, 8])
def test_what_a_file_has_as_it_is_takes_memory_for_its_own_layer_alone(
    folder: Path, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "MAP_BYTES", 1)
    model, processor = load(folder, bits)
    shown = processor.prepare("What is it?", images=[picture(1, 90, 70)])
    in_one_group = answer(model, shown)
    monkeypatch.setattr(vit, "GROUP_PATCHES", 1)
    layers = vit.vision_of(model.towers).layers
    inside = [m.packed for m in layers.modules() if isinstance(m, Linear) and m.packed is not None]
    assert inside
    for _ in range(2):
        assert answer(model, shown) == in_one_group
        assert all(each.is_waiting == (bits is None) for each in late(model) if each in inside)
