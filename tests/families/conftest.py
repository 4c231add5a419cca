"""Checkpoints and references, each built once in a session and only when a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .checkpoints import Case, write_checkpoint
from .oracle import Reference


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """Gives the folder of a case's checkpoint."""
    folders: dict[str, Path] = {}

    def folder_of(case: Case) -> Path:
        if case.name not in folders:
            folder = tmp_path_factory.mktemp(case.name)
            folders[case.name] = write_checkpoint(case, folder)
        return folders[case.name]

    return folder_of


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[Case], Path]) -> Callable[[Case], Reference]:
    """Gives a case's checkpoint as Transformers loads it."""
    references: dict[str, Reference] = {}

    def reference_of(case: Case) -> Reference:
        if case.name not in references:
            references[case.name] = Reference(checkpoint(case))
        return references[case.name]

    return reference_of
