"""Smaller models within a nested one: the tables that name them, and what is left of a model."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import opsin
from opsin.checkpoint import cut as cutting
from opsin.checkpoint.cut import cut
from opsin.checkpoint.safetensors import stored_tensors
from opsin.errors import CheckpointError, InputError
from opsin.families.gemma3n import SLICES
from opsin.families.slices import read_slices
from opsin.server.manager import Manager
from opsin.server.settings import read_settings

from .checkpoints import Case
from .conftest import Lab
from .ours import Ours, relative_error
from .zoo import gemma, gemma3n

KINDS = ["sliding_attention", "full_attention"] * 3
SKIPPED, KEPT, WIDTHS = (0, 3), (1, 2, 4, 5), (48, 80, 64, 32)
HEADER = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
ROW = 'small,4,0.1,50.00%,"[1_6 * 3, 80, 64, 32]","[0, 3]"\n'
# How many billions of parameters a feed-forward block of the largest model has.
BLOCK = 3 * 2048 * 16384 / 1e9


def nested() -> Case:
    """Six layers, of which the last three read the keys and values of layers 1 and 2."""
    case = gemma3n.CASES[0]
    config: dict[str, Any] = copy.deepcopy(dict(case.config))
    config["text_config"] |= {
        "activation_sparsity_pattern": [0.9, 0.8, 0.0, 0.7, 0.0, 0.0],
        "intermediate_size": [80] * 6,
        "layer_types": KINDS,
        "num_hidden_layers": 6,
        "num_kv_shared_layers": 3,
    }
    return dataclasses.replace(case, variant="nested", config=config, seed=3)


@pytest.fixture
def lab(labs: Callable[[Case], Lab]) -> Lab:
    return labs(nested())


def table(folder: Path, rows: str) -> Path:
    """A file of slices."""
    path = folder / "slices.csv"
    path.write_text(HEADER + rows, encoding="utf-8")
    return path


def cut_by_hand(lab: Lab, folder: Path) -> Lab:
    """The checkpoint of the slice, as the authors' notebook saves it."""
    for file in lab.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((lab.folder / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    for name in ("layer_types", "activation_sparsity_pattern"):
        text[name] = [text[name][i] for i in KEPT]
    text |= {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": list(WIDTHS)}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    left = {}
    for name, tensor in load_file(lab.folder / "model.safetensors").items():
        head, found, tail = name.partition("language_model.layers.")
        if found:
            old, _, rest = tail.partition(".")
            if int(old) in SKIPPED:
                continue
            new = KEPT.index(int(old))
            width = WIDTHS[new]
            if rest.startswith("mlp."):
                tensor = tensor[:, :width] if "down" in rest else tensor[:width]
            name = f"{head}{found}{new}.{rest}"
        elif "embed_tokens_per_layer" in name:
            tensor = tensor.unflatten(1, (6, -1))[:, list(KEPT)].flatten(1)
        elif "per_layer_model_projection" in name:
            tensor = tensor.unflatten(0, (6, -1))[list(KEPT)].flatten(0, 1)
        left[name] = tensor.contiguous()
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    return Lab(lab.case, folder)


def loaded(lab: Lab, name: str, config: Path) -> Ours:
    """The lab's checkpoint with a slice taken."""
    ours = copy.copy(lab.ours)
    ours.model, ours.processor = opsin.load(
        lab.folder, device="cpu", matformer_slice=name, matformer_config=str(config)
    )
    ours.prompts = {}
    return ours


def test_a_slice_computes_what_the_checkpoint_cut_by_hand_does(lab: Lab, tmp_path: Path) -> None:
    target = tmp_path / "cut"
    target.mkdir()
    reference = cut_by_hand(lab, target)
    ours = loaded(lab, "small", table(tmp_path, ROW))
    assert len(ours.model.decoder.layers) == 4
    for name in ("text", "mixed"):
        scene = lab.scenes[name]
        got = ours.logits(ours.prompt(scene))
        assert relative_error(got, reference.reference_logits(name)) < 1e-4, name
        assert relative_error(got, lab.reference_logits(name)) > 0.05, name


def test_a_slice_of_everything_is_the_model_itself(lab: Lab, tmp_path: Path) -> None:
    path = table(tmp_path, f'all,6,0.2,,"{[80] * 6}",\n')
    expected = lab.ours.model.state_dict()
    got = loaded(lab, "all", path).model.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(
    ("row", "name", "what"),
    [
        (ROW, "smal", "Did you mean 'small'"),
        ('x,5,0.1,,"[80, 80, 80, 80, 80]",[1]\n', "x", "keys and values others read"),
        ('x,5,0.1,,"[80, 80, 80, 80, 80]",[2]\n', "x", "keys and values others read"),
        ('x,6,0.1,,"[80, 80, 81, 80, 80, 80]",\n', "x", "layer 2 is only 80 wide"),
        ('x,5,0.1,,"[80, 80, 80, 80, 80]",\n', "x", "skips 0, but the model has 6"),
        ('x,5,0.1,,"[80, 80, 80, 80, 80]",[9]\n', "x", "skips 1, but the model has 6"),
        ('x,6,0.1,,"[80]",\n', "x", "1 widths for 6 layers"),
        ('x,1,0.1,,"[__import__]",\n', "x", "'__import__' is no number"),
        ('x,1,0.1,,"[8 ** 9]",\n', "x", "is no number"),
        ("x,1\n", "x", "row 2"),
        ("", "x", "no row"),
    ],
)
def test_a_slice_that_cannot_be_taken_is_refused(
    lab: Lab, tmp_path: Path, row: str, name: str, what: str
) -> None:
    with pytest.raises(InputError) as refusal:
        loaded(lab, name, table(tmp_path, row))
    assert what in str(refusal.value)


def test_a_table_without_a_name_and_a_missing_table_are_refused(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which to load"):
        opsin.load(lab.folder, device="cpu", matformer_config=str(table(tmp_path, ROW)))
    with pytest.raises(InputError, match=r"slices in none\.csv cannot be read"):
        loaded(lab, "small", tmp_path / "none.csv")


def test_a_model_without_slices_says_so(labs: Callable[[Case], Lab]) -> None:
    folder = labs(gemma.CASES[0]).folder
    with pytest.raises(InputError, match="hold no smaller ones"):
        opsin.load(folder, device="cpu", matformer_slice="small")


def test_the_table_that_comes_with_the_package() -> None:
    slices = read_slices(SLICES)
    assert len(slices) == 16
    assert slices["Main model"].widths == (16384,) * 35
    official = slices["Config for official E2B Model"]
    assert (official.widths, official.skipped) == ((8192,) * 30, frozenset(range(20, 25)))
    block = slices["Config for E2.49B (block-level)"]
    assert [i for i, width in enumerate(block.widths) if width == 16384] == [20, 21, 22, 23, 24]
    for each in slices.values():
        assert each.kept(35)
        assert not each.skipped & {18, 19}
        # A skipped layer takes its attention with it, about 0.012.
        left = 3.98 - BLOCK * (35 - sum(each.widths) / 16384) - 0.012 * len(each.skipped)
        assert each.parameters == pytest.approx(left, abs=0.025), each.name


def test_runs_of_a_matrix_are_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = torch.arange(77, dtype=torch.float32).view(11, 7)
    save_file({"before": torch.zeros(3), "matrix": matrix}, tmp_path / "model.safetensors")
    stored = {each.name: each for each in stored_tensors(tmp_path / "model.safetensors")}
    monkeypatch.setattr(cutting, "CHUNK", 2 * 7 * 4)
    part = cut(stored["matrix"], rows=((0, 5), (8, 11)), columns=((1, 2), (4, 7)))
    expected = matrix[[0, 1, 2, 3, 4, 8, 9, 10]][:, [1, 4, 5, 6]]
    assert part.shape == (8, 4)
    assert part.num_bytes == 8 * 4 * 4
    assert torch.equal(part.read(), expected)
    narrow = torch.empty(8, 4, dtype=torch.bfloat16)
    part.read_into(narrow)
    assert torch.equal(narrow, expected.to(torch.bfloat16))
    with pytest.raises(CheckpointError, match="cannot be sliced"):
        cut(part)


def test_the_command_line_and_the_server_take_a_slice(lab: Lab, tmp_path: Path) -> None:
    path = table(tmp_path, ROW)
    words = ("generate", "-m", lab.folder, "--device", "cpu", "--max-tokens", "2", "Hello")
    slices = ("--matformer-config", path, "--matformer-slice")
    done = run(*words, *slices, "small")
    assert done.returncode == 0, done.stderr
    for command in (words, ("chat", "-m", lab.folder, "--device", "cpu")):
        refused = run(*command, *slices, "other")
        assert refused.returncode == 2
        assert "There is no slice 'other'" in refused.stderr
    given = {"model": str(lab.folder), "matformer_slice": "small", "matformer_config": str(path)}
    settings = read_settings({**given, "device": "cpu"}, {}, {})
    manager = Manager(settings)
    read = manager._read(manager._own(), lab.folder)
    assert len(read.model.decoder.layers) == 4
    read.engine.close()
    other = dataclasses.replace(manager._own(), own=False)
    read = manager._read(other, lab.folder)
    assert len(read.model.decoder.layers) == 6
    read.engine.close()


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "opsin", *map(str, words)]
    nothing = subprocess.DEVNULL
    return subprocess.run(command, stdin=nothing, capture_output=True, text=True, timeout=120)
