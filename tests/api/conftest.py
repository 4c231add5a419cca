"""A tiny model, loaded once, and pictures to ask it about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import opsin
from tests.families.checkpoints import write_checkpoint
from tests.families.zoo.qwen import CASES


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with every file that a published one has."""
    case = next(case for case in CASES if case.family == "qwen3_vl")
    return write_checkpoint(case, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def loaded(folder: Path) -> tuple[Any, Any]:
    """That checkpoint as `opsin.load` gives it."""
    return opsin.load(str(folder), device="cpu")
