"""Memory that is not used goes back to the system, and what it held comes back when it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from opsin.engine.memory import give_back_startup
from opsin.kernels.memory import give_back_freed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(kind: str) -> int:
    """Bytes of this process that are in memory, of one kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024


def test_torch_s_code_is_not_resident_until_it_runs_again() -> None:
    torch.fft.fft(torch.ones(8))
    before = resident("RssFile")
    give_back_startup()
    assert resident("RssFile") < before - (8 << 20)
    torch.testing.assert_close(torch.fft.ifft(torch.fft.fft(torch.ones(8))).real, torch.ones(8))


def test_freed_blocks_between_others_go_back() -> None:
    size = 64 << 10
    blocks = [torch.ones(size // 4) for _ in range(1024)]
    kept = blocks[::16]  # so that the C library cannot shrink its heap
    del blocks
    before = resident("RssAnon")
    give_back_freed()
    assert resident("RssAnon") < before - (32 << 20)
    assert all(float(block.sum()) == size // 4 for block in kept)
