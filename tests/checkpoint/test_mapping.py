"""Large tensors that are stored just as they are needed are the file itself, and cost nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opsin.checkpoint import weights
from opsin.checkpoint.safetensors import stored_tensors
from opsin.errors import CheckpointError
from opsin.kernels import Kernels
from opsin.nn.linear import Linear

CPU = torch.device("cpu")


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Parameter(torch.empty(48, 32))
        self.turned = nn.Parameter(torch.empty(48, 32))
        self.fused = nn.Parameter(torch.empty(48, 32))
        self.small = nn.Parameter(torch.empty(3))

    def part(self, name: str, index: tuple[int, ...]) -> Tensor:
        return self.get_parameter(name).data[24 * index[0] : 24 * (index[0] + 1)]


RULES = [("^turned$", "turned^T"), (r"^fused\.(\d)$", r"fused[\1]")]


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Tensor]]:
    monkeypatch.setattr(weights, "MAP_BYTES", 64)
    tensors = {
        "plain": torch.randn(48, 32),
        "turned": torch.randn(32, 48),
        "fused.0": torch.randn(24, 32),
        "fused.1": torch.randn(24, 32),
        "small": torch.randn(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


def filled(path: Path, dtype: torch.dtype = torch.float32) -> Parts:
    with torch.device("meta"):
        model = Parts()
    weights.assign(model, stored_tensors(path), RULES, dtype=dtype, device=CPU)
    return model


def is_mapped(parameter: Tensor, path: Path) -> bool:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [tuple(int(end, 16) for end in x[0].split("-")) for x in lines if x[-1] == str(path)]
    return any(first <= parameter.data_ptr() < end for first, end in ranges)


def test_what_can_be_mapped_is_and_everything_has_its_values(
    stored: tuple[Path, dict[str, Tensor]],
) -> None:
    path, tensors = stored
    model = filled(path)
    assert torch.equal(model.plain, tensors["plain"])
    assert torch.equal(model.turned, tensors["turned"].T)
    assert torch.equal(model.fused, torch.cat([tensors["fused.0"], tensors["fused.1"]]))
    assert torch.equal(model.small, tensors["small"])
    if Path("/proc/self/maps").exists():
        mapped = {name for name, p in model.named_parameters() if is_mapped(p, path)}
        assert mapped == {"plain"}
        cast = filled(path, torch.bfloat16)
        assert torch.equal(cast.plain, tensors["plain"].bfloat16())
        assert not is_mapped(cast.plain, path)


def test_writing_to_a_mapped_parameter_leaves_the_file(
    stored: tuple[Path, dict[str, Tensor]],
) -> None:
    path, tensors = stored
    filled(path).plain.data.zero_()
    assert torch.equal(filled(path).plain, tensors["plain"])


def test_a_file_that_shrank_is_an_error(stored: tuple[Path, dict[str, Tensor]]) -> None:
    path, _ = stored
    entries = list(stored_tensors(path))
    with path.open("r+b") as file:
        file.truncate(entries[0].start + 100)
    with torch.device("meta"):
        model = Parts()
    with pytest.raises(CheckpointError, match="it ends inside tensor"):
        weights.assign(model, entries, RULES, dtype=torch.float32, device=CPU)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_mapped_weight_can_be_let_go_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    stored = torch.randn(2048, 1024)
    save_file({"weight": stored, "bias": torch.zeros(2048)}, path)
    with torch.device("meta"):
        layer = Linear(Kernels(), 1024, 2048, bias=True)
    weights.assign(layer, stored_tensors(path), [], dtype=torch.float32, device=CPU)
    assert torch.equal(layer.weight, stored)
    before = resident_file_bytes()
    layer.release()
    assert resident_file_bytes() < before - stored.nbytes // 2
    assert torch.equal(layer.weight, stored)
    assert torch.equal(layer.bias, torch.zeros(2048))


def resident_file_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("RssFile:")).split()[1]) * 1024
