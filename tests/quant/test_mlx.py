"""Checkpoints in MLX's quantised layout answer as the weights that their codes stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import opsin
from opsin.engine import model as loading
from opsin.errors import CheckpointError, InputError
from opsin.nn.linear import Linear
from opsin.quant.affine import dequantise
from tests.families.checkpoints import write_checkpoint
from tests.families.ours import Ours, relative_error
from tests.families.scenes import scenes
from tests.families.zoo import CASES

CASE = next(case for case in CASES if case.name == "qwen2_5_vl-saved_untied")
GROUP = 32


def packed_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (rows, columns) as little-endian bit fields in 32-bit words."""
    flags = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits]
    stream = np.packbits(flags.reshape(codes.shape[0], -1), axis=-1, bitorder="little")
    return torch.from_numpy(stream.view(np.uint32).copy())


def is_quantised(name: str, weight: torch.Tensor) -> bool:
    return name.endswith(".weight") and weight.ndim == 2 and weight.shape[1] % GROUP == 0 and (
        "visual" not in name
    )  # fmt: skip


def bits_of(name: str, bits: int) -> int:
    """In a mixed checkpoint values and the head have more bits."""
    return 8 if bits == 0 and ("v_proj" in name or "lm_head" in name) else bits or 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(CASE, tmp_path_factory.mktemp("plain"))


def write_both(plain: Path, folder: Path, bits: int) -> tuple[Path, Path]:
    """The folder with codes, and the folder with the weights that they stand for."""
    coded, whole = folder / "coded", folder / "whole"
    for target in (coded, whole):
        shutil.copytree(plain, target)
    weights = load_file(plain / "model.safetensors")
    codes_out: dict[str, torch.Tensor] = {}
    whole_out: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {"group_size": GROUP, "bits": bits or 4}
    for name, weight in weights.items():
        codes_out[name] = whole_out[name] = weight
        if not is_quantised(name, weight):
            continue
        layer, own = name.removesuffix(".weight"), bits_of(name, bits)
        if own != config["bits"]:
            config[layer] = {"group_size": GROUP, "bits": own}
        grouped = weight.float().unflatten(1, (-1, GROUP))
        low, high = grouped.amin(2), grouped.amax(2)
        scales = ((high - low) / (2**own - 1)).bfloat16()
        biases = low.bfloat16()
        codes = (grouped - biases.float()[..., None]) / scales.float()[..., None]
        codes = codes.round().clamp(0, 2**own - 1).to(torch.uint8).flatten(1)
        codes_out[name] = packed_words(codes, own)
        codes_out[f"{layer}.scales"], codes_out[f"{layer}.biases"] = scales, biases
        whole_out[name] = dequantise(codes, scales, biases).to(weight.dtype)
    save_file(codes_out, coded / "model.safetensors")
    save_file(whole_out, whole / "model.safetensors")
    stated = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps({**stated, "quantization": config}))
    return coded, whole


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8, 0], ids=lambda bits: str(bits or "mixed"))
@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
def test_codes_answer_as_their_weights(
    plain: Path, tmp_path: Path, bits: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded, whole = write_both(plain, tmp_path, bits)
    expected = Ours(CASE, whole, dtype="float32")
    if not native:
        monkeypatch.setattr(loading, "native_library", lambda: None)
    got = Ours(CASE, coded, dtype="float32")
    kinds = {m.packed.format.kind for m in got.model.decoder.modules()
             if isinstance(m, Linear) and m.packed is not None}  # fmt: skip
    assert kinds == ({"q4", "q8"} if bits == 0 else {f"q{max(bits, 4)}"})
    scene = scenes(CASE)[0]
    logits = [model.logits(model.prompt(scene)) for model in (got, expected)]
    # Native products round activations to 8 bits, the plain ones do not.
    assert relative_error(*logits) < (0.3 if native else 1e-4)


def test_a_config_that_lies_is_refused(plain: Path, tmp_path: Path) -> None:
    coded, _ = write_both(plain, tmp_path, 4)
    stated = json.loads((coded / "config.json").read_text())
    for wrong in ({"group_size": 64, "bits": 4}, {"group_size": GROUP, "bits": 7}):
        (coded / "config.json").write_text(json.dumps({**stated, "quantization": wrong}))
        with pytest.raises(CheckpointError, match="cannot be read"):
            opsin.load(coded, device="cpu")


def test_quantising_again_is_refused(plain: Path, tmp_path: Path) -> None:
    coded, _ = write_both(plain, tmp_path, 4)
    with pytest.raises(InputError, match="already"):
        opsin.load(coded, device="cpu", quantize=8)
