"""A tiny checkpoint, loaded twice to run on plain torch, and on the native stack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import opsin
from opsin.engine import model as loading
from opsin.kernels import cpu
from tests.families.checkpoints import write_checkpoint
from tests.families.zoo import CASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = next(case for case in CASES if case.name == "qwen3_vl-published_tied")
    return write_checkpoint(case, tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> tuple[Any, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "native_library", lambda *_: None)
        return opsin.load(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def native(folder: Path) -> tuple[Any, Any]:
    if cpu.load() is None:
        pytest.skip(f"not built: {cpu.why_missing()}")
    loaded = opsin.load(str(folder), device="cpu", dtype="bfloat16")
    assert loaded[0].decoder.native is not None
    return loaded


@pytest.fixture(params=["plain", "native"])
def loaded(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return request.getfixturevalue(request.param)
