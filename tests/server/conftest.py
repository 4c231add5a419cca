"""A tiny checkpoint, and a server of it that most tests share."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..families.checkpoints import write_checkpoint
from ..families.pictures import picture
from ..families.zoo import qwen
from .running import Running, serving
from .tool_template import TOOL_TEMPLATE

CASE = next(case for case in qwen.CASES if case.family == "qwen3_vl")
KEY = "a-key-for-tests"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASE, tmp_path_factory.mktemp("server") / "tiny-vl")


@pytest.fixture(scope="session")
def media_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    picture(1, 64, 48).save(folder / "inside.png")
    return folder


@pytest.fixture(scope="session")
def server(checkpoint: Path, media_root: Path) -> Iterator[Running]:
    with serving(checkpoint, media_root=(str(media_root),)) as running:
        yield running.ready()


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model takes tools and thinks."""
    case = dataclasses.replace(CASE, chat_template=TOOL_TEMPLATE)
    folder = write_checkpoint(case, tmp_path_factory.mktemp("tools") / "tiny-caller")
    with serving(folder, max_tokens=400) as running:
        yield running.ready()


@pytest.fixture(scope="session")
def keyed(checkpoint: Path) -> Iterator[Running]:
    with serving(checkpoint, api_key=(KEY, "another-key")) as running:
        running.client.headers["authorization"] = f"Bearer {KEY}"
        yield running.ready()


@pytest.fixture(scope="session")
def data_url() -> str:
    buffer = io.BytesIO()
    picture(2, 80, 60).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(autouse=True)
def _quiet(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did, the shared server holds nothing of it afterwards."""
    yield
    from .running import wait_for

    for name in ("server", "keyed", "caller"):
        if name in request.fixturenames:
            running = request.getfixturevalue(name)
            wait_for(running.is_quiet)
