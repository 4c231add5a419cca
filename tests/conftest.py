"""What every test runs under: few threads, no hub, the same random numbers each time."""

from __future__ import annotations

import os
import zlib

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Transformers remembers whether torchvision was there when it was first imported.
from tests.families.torchvision_operators import declare

declare()

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Of the tests marked slow, one of so many runs unless all are asked for: the same ones each time.
SHARE = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slow all` runs every test."""
    parser.addoption("--slow", choices=("share", "all"), default="share", help="which slow tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave most slow tests out, by a checksum of their names."""
    if config.getoption("--slow") == "all":
        return
    kept, left = [], []
    for item in items:
        out = item.get_closest_marker("slow") and zlib.crc32(item.nodeid.encode()) % SHARE
        (left if out else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)
