"""Packed weights kept and mapped again: the same model, and never one that was made from others."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import opsin
from opsin.checkpoint import repacked
from opsin.cli import models
from opsin.config import settings
from opsin.engine import packing, repacking
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.model import Model, load_model
from opsin.errors import CheckpointError
from opsin.kernels import cpu
from opsin.kernels.cpu import PackedMatrix, matrix
from opsin.nn.experts import ExpertLinear
from opsin.nn.late import LateMatrix
from opsin.nn.linear import Embedding, Linear
from tests.families.checkpoints import write_checkpoint
from tests.families.ours import answers, tokens
from tests.families.pictures import picture
from tests.families.zoo import CASES

pytestmark = pytest.mark.skipif(cpu.load() is None, reason=f"not built: {cpu.why_missing()}")
DENSE, EXPERTS = "qwen3_vl-saved_untied", "qwen3_vl_moe-every_layer"
Load = Callable[..., Model]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    chosen = [case for case in CASES if case.name in (DENSE, EXPERTS)]
    return {
        case.name: write_checkpoint(case, tmp_path_factory.mktemp(case.name)) for case in chosen
    }


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST_ROWS", 1)


@pytest.fixture
def folder(written: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the dense checkpoint that a test may change."""
    return Path(shutil.copytree(written[DENSE], tmp_path / "checkpoint"))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def load(folder: Path, cache: Path) -> Load:
    def loaded(where: Path | str = cache, dtype: str = "bfloat16") -> Model:
        return load_model(folder, device="cpu", dtype=dtype, quantize=8, repacked_cache=where)

    return loaded


def matrices(model: Model) -> dict[str, PackedMatrix]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear):
            found |= {f"{name}.{i}": each for i, each in enumerate(module.packed)}
        elif isinstance(module, Linear | Embedding) and module.packed is not None:
            packed = module.packed
            found[name] = packed.now() if isinstance(packed, LateMatrix) else packed
    return found


def packed_bytes(model: Model) -> dict[str, bytes]:
    return {name: bytes(each.memory()) for name, each in matrices(model).items()}


def views(model: Model) -> bool:
    """Whether all matrices lie in a mapped file; that all or none do is checked."""
    kinds = {each.is_view for each in matrices(model).values()}
    assert len(kinds) == 1
    return kinds.pop()


@pytest.mark.parametrize(
    ("name", "bits", "dtype"),
    [
        (DENSE, 8, "bfloat16"),
        (DENSE, 4, "bfloat16"),
        (EXPERTS, 8, "float32"),
    ],
)
def test_what_is_mapped_is_what_was_packed(
    written: dict[str, Path], cache: Path, name: str, bits: int | None, dtype: str
) -> None:
    seen = []
    for where in ("off", str(cache), str(cache)):
        model, processor = opsin.load(
            written[name], device="cpu", dtype=dtype, quantize=bits, repacked_cache=where
        )
        prompt = processor.prepare("What is it?", images=[picture(1, 90, 70)])
        limits = EngineLimits(memory=1 << 24, block_size=8)
        with Engine(model, processor, limits) as engine:
            events = answers(engine, [prompt], count=16, logprobs=1)[0]
        seen.append((packed_bytes(model), tokens(events), [event.logprobs for event in events]))
    assert views(model)
    assert seen[0] == seen[1] == seen[2]


def test_what_is_read_in_place_answers_as_what_was_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    seen = []
    for least in (1 << 40, 0):
        monkeypatch.setattr(packing, "IN_PLACE_LEAST", least)
        model, processor = opsin.load(folder, device="cpu", dtype="bfloat16")
        in_place = [each.is_in_place for each in matrices(model).values()]
        assert any(in_place) == (least == 0)
        prompt = processor.prepare("What is it?", images=[picture(1, 90, 70)])
        with Engine(model, processor, EngineLimits(memory=1 << 24, block_size=8)) as engine:
            events = answers(engine, [prompt], count=16, logprobs=1)[0]
        seen.append((tokens(events), [event.logprobs for event in events]))
    assert seen[0] == seen[1]


def test_bfloat16_in_fewer_bits_answers_as_it_is(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it saves time; of large models where it is kept, so that loading takes it once."""
    library = cpu.load()
    assert library is not None
    monkeypatch.setattr(packing, "LOSSLESS_LEAST", 0)

    def loaded(sets: tuple[str, ...], where: str, least: int) -> tuple[set[str], bool, Any]:
        monkeypatch.setattr(packing, "LOSSLESS_SETS", sets)
        monkeypatch.setattr(packing, "IN_PLACE_LEAST", least)
        model, processor = opsin.load(
            "bundled", device="cpu", dtype="bfloat16", repacked_cache=where
        )
        prompt = processor.prepare("What is it?", images=[picture(1, 90, 70)])
        with Engine(model, processor, EngineLimits(memory=1 << 24, block_size=8)) as engine:
            events = answers(engine, [prompt], count=16, logprobs=1)[0]
        found = matrices(model).values()
        kinds = {each.format.kind for each in found}
        is_kept = any(each.is_view for each in found)
        return kinds, is_kept, (tokens(events), [event.logprobs for event in events])

    here, file = (library.isa,), str(cache)
    seen = [
        loaded((), "off", 0),
        loaded(here, "off", 0),
        loaded(here, "off", 1 << 40),
        loaded(here, file, 0),
        loaded(here, file, 0),
    ]
    plain, fewer = {"bf16"}, {"bf13"}
    ways = [(kinds, is_kept) for kinds, is_kept, _ in seen]
    assert ways == [(plain, False)] * 2 + [(fewer, False)] * 2 + [(fewer, True)]
    assert all(answer == seen[0][2] for _, _, answer in seen)


def test_a_mapped_model_reads_none_of_what_was_packed(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    for fill in ("fill", "fill_file", "fill_affine"):
        monkeypatch.setattr(PackedMatrix, fill, None)
    assert views(load())


def test_the_command_line_lists_what_is_kept(
    load: Load, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    (path,) = cache.iterdir()
    (cache / "foreign.repacked").write_text("not one of ours")
    monkeypatch.setenv("OPSIN_REPACKED_CACHE", str(cache))
    settings.cache_clear()
    try:
        listed = json.loads(CliRunner().invoke(models.app, ["--json"]).stdout)["repacked"]
        shown = CliRunner().invoke(models.app).stdout
    finally:
        settings.cache_clear()
    assert [(each["path"], each["as"]) for each in listed] == [(str(path), "q8")]
    assert listed[0]["bytes"] == path.stat().st_size
    assert "delete a file to free its space" in shown
    assert str(path) in shown


def test_another_recipe_has_a_file_of_its_own(load: Load, cache: Path) -> None:
    loaded = [load(dtype=dtype) for dtype in ("bfloat16", "float32") * 2]
    assert [views(model) for model in loaded] == [False, False, True, True]
    assert len(repacked.kept_files(cache)) == 2


def test_a_checkpoint_that_changed_is_packed_again(load: Load, folder: Path, cache: Path) -> None:
    before = packed_bytes(load())
    path = folder / "model.safetensors"
    size = path.stat().st_size
    tensors = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(1, 1))
    assert path.stat().st_size == size, "only the time says that it is another"
    model = load()
    assert not views(model)
    assert packed_bytes(model) == packed_bytes(load(where="off")) != before
    assert views(load())
    assert len(list(cache.iterdir())) == 1, "the new file is in the old one's place"


@pytest.mark.parametrize("attribute", ["LAYOUT", "build_id"])
def test_another_build_packs_again(
    load: Load, attribute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    if attribute == "LAYOUT":
        monkeypatch.setattr(repacking, "LAYOUT", -1)
    else:
        monkeypatch.setattr(cpu, "build_id", lambda: "another")
    assert [views(load()), views(load())] == [False, True]


def foreign(path: Path) -> None:
    save_file({"x": torch.zeros(3)}, path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def renamed_parts(path: Path) -> None:
    kept = repacked.stored_metadata(path)
    part = memoryview(bytes(64))
    repacked.write(path, kept["opsin"], "", "", [("another", part)])


def shrunk_parts(path: Path) -> None:
    kept = repacked.stored_metadata(path)
    names = [tensor.name for tensor in repacked.stored_tensors(path)][:-1]
    repacked.write(path, kept["opsin"], "", "", [(name, memoryview(bytes(64))) for name in names])


@pytest.mark.parametrize(
    "harm",
    [
        foreign,
        cut,
        renamed_parts,
        shrunk_parts,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x00" * 100),
        lambda path: os.truncate(path, 200),
    ],
)
def test_a_damaged_file_is_said_in_a_line_and_made_again(
    load: Load, cache: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    expected = packed_bytes(load())
    (path,) = cache.iterdir()
    harm(path)
    with caplog.at_level(logging.WARNING, "opsin"):
        model = load()
    assert not views(model)
    (record,) = caplog.records
    assert "packing the weights again" in record.getMessage()
    assert "\n" not in record.getMessage()
    again = load()
    assert views(again)
    assert packed_bytes(model) == packed_bytes(again) == expected


def test_a_folder_that_cannot_be_written_is_said_in_a_line(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "opsin"):
        assert not views(load(where=tmp_path / "file" / "kept"))
    assert "cannot keep the packed weights" in caplog.text
    assert len(caplog.records) == 1


def await_keeper() -> None:
    """Until what is kept unasked, beside the first answers, is written."""
    for thread in threading.enumerate():
        if thread.name == repacking.KEEPER:
            thread.join()


def test_what_nobody_asked_for_is_written_beside_the_first_answers(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path))
    monkeypatch.setattr(repacking, "UNASKED_LEAST", 1)
    monkeypatch.setattr(repacking, "UNASKED_SHARE", 0.5)
    settings.cache_clear()
    loaded, write = threading.Event(), repacked.write

    def late(*args: Any) -> int:
        assert loaded.wait(60), "loading waits for the file"
        return write(*args)

    monkeypatch.setattr(repacked, "write", late)
    load(where="auto")
    assert not list((tmp_path / "repacked").glob("*.repacked"))
    loaded.set()
    await_keeper()
    assert len(list((tmp_path / "repacked").glob("*.repacked"))) == 1
    settings.cache_clear()


def test_unasked_only_what_is_large_and_fits_well_is_kept(
    load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSIN_CACHE", str(tmp_path))
    settings.cache_clear()
    folder = tmp_path / "repacked"

    def load_unasked() -> Model:
        model = load(where="auto")
        await_keeper()
        return model

    load_unasked()  # too small
    assert not list(folder.glob("*"))
    monkeypatch.setattr(repacking, "UNASKED_LEAST", 1)
    monkeypatch.setattr(repacking, "UNASKED_SHARE", 0.0)
    load_unasked()  # too large for the disk
    assert not list(folder.glob("*"))
    assert not caplog.records
    monkeypatch.setattr(repacking, "UNASKED_SHARE", 0.5)
    assert not views(load_unasked())
    assert "--repacked-cache off" in caplog.text
    assert len(list(folder.iterdir())) == 1
    assert views(load_unasked())
    assert len(caplog.records) == 1
    shutil.rmtree(folder)
    folder.write_text("")
    load_unasked()  # where nothing can be written, nobody who did not ask is told
    assert len(caplog.records) == 1
    settings.cache_clear()


def test_a_full_disk_leaves_nothing_behind(
    load: Load, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repacked, "SPARE", 1 << 62)
    assert not views(load())
    assert "No space left" in caplog.text
    assert not list(cache.iterdir())
    monkeypatch.setattr(repacked, "SPARE", 0)

    def full(file: int, part: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repacked, "_write_all", full)
    assert not views(load())
    assert not list(cache.iterdir())


def test_a_model_with_nothing_packed_says_that_nothing_is_kept(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for dtype in ("float32", "bfloat16"):
        caplog.clear()
        load_model(folder, device="cpu", dtype=dtype, repacked_cache=cache)
        assert "nothing of this model is packed" in caplog.text
    assert not cache.exists()


def test_two_that_write_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / f"model{repacked.SUFFIX}"
    parts = [(name, memoryview(os.urandom(200_000))) for name in ("one", "two")]
    writers = [
        threading.Thread(target=repacked.write, args=(path, "key", "", "", parts)) for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert list(tmp_path.iterdir()) == [path]
    found = repacked.read(path, "key")
    assert found is not None
    first = found.memory.ctypes.data
    for name, part in parts:
        address, size = found.places[name]
        assert address % 64 == 0
        assert found.memory[address - first :][:size].tobytes() == part.tobytes()
    assert repacked.read(path, "another") is None
    assert repacked.read(tmp_path / "missing", "key") is None


def test_what_a_killed_process_left_is_removed_in_time(tmp_path: Path) -> None:
    old, fresh = (tmp_path / f"{name}{repacked.UNFINISHED}" for name in ("old", "fresh"))
    for path in (old, fresh):
        path.write_bytes(b"half")
    hours_ago = time.time() - 2 * repacked.ABANDONED
    os.utime(old, (hours_ago, hours_ago))
    repacked.write(tmp_path / "new", "key", "", "", [])
    assert {path.name for path in tmp_path.iterdir()} == {"new", fresh.name}


def test_a_file_without_its_end_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(64)}, tmp_path / "file", {"opsin": "key"})
    with pytest.raises(CheckpointError, match="its end is missing"):
        repacked.read(tmp_path / "file", "key")


def test_products_may_read_no_further_than_the_file() -> None:
    assert repacked.SLACK >= matrix.SLACK
