"""The native library under every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from opsin.kernels.cpu import Library, load, why_missing

_LIBRARY = load(threads=2)
INSTRUCTION_SETS = _LIBRARY.instruction_sets() if _LIBRARY else ["none"]


@pytest.fixture(params=INSTRUCTION_SETS)
def native(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library with one instruction set forced and two threads."""
    yield from _configured(request.param)


@pytest.fixture
def best() -> Iterator[Library]:
    """The library as this machine would use it, with two threads."""
    yield from _configured("auto")


def _configured(isa: str) -> Iterator[Library]:
    if _LIBRARY is None:
        pytest.skip(f"no native kernels: {why_missing()}")
    _LIBRARY.configure(isa, 2)
    yield _LIBRARY
    _LIBRARY.configure("auto", 2)
