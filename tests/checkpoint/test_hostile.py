"""Checkpoints that lie or bring code: refused in words, nothing read amiss, nothing run."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

import opsin
from opsin.checkpoint.safetensors import stored_tensors
from opsin.errors import CheckpointError

from ..families.checkpoints import write_checkpoint
from ..families.zoo.qwen import CASES

TENSORS = {"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(4).half()}
WHOLE = save(TENSORS)
LENGTH = struct.unpack("<Q", WHOLE[:8])[0]


def file_of(header: Any, data: bytes = b"\0" * 32, length: int | None = None) -> bytes:
    """A file with that header, which may claim another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**fields: Any) -> dict[str, Any]:
    return {"t": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **fields}}


LIES = {
    "nothing": b"",
    "a few bytes": b"\0\0\0",
    "a header beyond the file": file_of(b"{}", length=10_000),
    "a header of all memory": file_of(b"{}", length=2**64 - 1),
    "no JSON": file_of(b"\xff\xfe{"),
    "nested without end": file_of(b"[" * 100_000),
    "no object": file_of([1, 2]),
    "no entry": file_of({"t": 3}),
    "offsets beyond the file": file_of(entry(data_offsets=[0, 16]), b"\0" * 8),
    "offsets far beyond": file_of(entry(shape=[2**40], data_offsets=[0, 2**42])),
    "offsets that end first": file_of(entry(data_offsets=[16, 0])),
    "offsets before the data": file_of(entry(data_offsets=[-16, 0])),
    "a shape that is more": file_of(entry(shape=[2, 3])),
    "a product that overflows": file_of(entry(shape=[2**32, 2**32], data_offsets=[0, 0])),
    "a side that overflows": file_of(entry(shape=[0, 2**70], data_offsets=[0, 0])),
    "a negative side": file_of(entry(shape=[-2, -2])),
    "half a side": file_of(entry(shape=[2.0, 2])),
    "a side that is true": file_of(entry(shape=[True, 4])),
    "an unknown type": file_of(entry(dtype="F7")),
    "a type that is a list": file_of(entry(dtype=["F32"])),
    "three offsets": file_of(entry(data_offsets=[0, 8, 16])),
}


def read_all(path: Path) -> list[torch.Tensor]:
    return [tensor.read() for tensor in stored_tensors(path)]


@pytest.mark.parametrize("name", LIES)
def test_row_20_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(LIES[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_all(path)


@settings(max_examples=150)
@given(
    changes=st.lists(st.tuples(st.integers(0, 8 + LENGTH - 1), st.integers(0, 255)), max_size=4),
    kept=st.none() | st.integers(0, len(WHOLE)),
)
def test_row_20_any_damage_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], kept: int | None
) -> None:
    damaged = bytearray(WHOLE)
    for place, value in changes:
        damaged[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(bytes(damaged)[:kept])
    try:
        found = read_all(path)
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in found) <= len(WHOLE)


def test_row_19_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.family == "qwen3_vl")
    folder = write_checkpoint(case, tmp_path / "model")
    mark = tmp_path / "it ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    names = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
    code = {"auto_map": dict.fromkeys(names, "evil.Thing")}
    for path in folder.glob("*config.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), **code}))
    model, processor = opsin.load(str(folder), device="cpu")
    assert opsin.generate(model, processor, "Say something", max_tokens=2).generation_tokens
    model.engine.close()
    assert not mark.exists()
