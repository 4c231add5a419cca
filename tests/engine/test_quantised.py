"""Quantising while loading: what is quantised, the same answer in any company, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import opsin
from opsin.engine import model as loading
from opsin.engine import packing
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.model import Model
from opsin.errors import InputError
from opsin.kernels import cpu
from opsin.kernels.packed import PlainMatrix
from opsin.nn.linear import Linear
from opsin.quant.formats import quantised
from tests.families.checkpoints import write_checkpoint
from tests.families.ours import answers, tokens
from tests.families.pictures import picture
from tests.families.zoo import CASES

native = pytest.mark.skipif(cpu.load() is None, reason=f"not built: {cpu.why_missing()}")
DENSE, EXPERTS = "qwen3_vl-saved_untied", "qwen3_vl_moe-every_layer"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    chosen = [case for case in CASES if case.name in (DENSE, EXPERTS)]
    return {
        case.name: write_checkpoint(case, tmp_path_factory.mktemp(case.name)) for case in chosen
    }


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST_ROWS", 1)


def engine_of(model: Model, processor: Any, step: int = 2048) -> Engine:
    limits = EngineLimits(
        prefill_step_size=step, memory=1 << 24, block_size=8, prefix_cache=False, media_cache=0
    )
    return Engine(model, processor, limits)


@native
@pytest.mark.parametrize(
    ("name", "bits", "dtype"),
    [(DENSE, 8, "bfloat16"), (DENSE, 4, "bfloat16"), (EXPERTS, 8, "float32")],
)
def test_company_and_chunks_change_nothing(
    folders: dict[str, Path], name: str, bits: int, dtype: str
) -> None:
    model, processor = opsin.load(folders[name], device="cpu", dtype=dtype, quantize=bits)
    asked = [("What?", []), ("Describe it.", [picture(1, 90, 70)]), ("How many are there?", [])]
    prompts = [processor.prepare(words, images=images) for words, images in asked]
    alone = []
    for prompt in prompts:
        with engine_of(model, processor) as engine:
            alone += answers(engine, [prompt], count=24, logprobs=1)
    for step in (2048, 13):
        with engine_of(model, processor, step) as engine:
            together = answers(engine, [*prompts, *prompts], count=24, logprobs=1)
        for expected, events in zip([*alone, *alone], together, strict=True):
            assert tokens(events) == tokens(expected)
            if model.decoder.native is not None:
                assert [e.logprobs for e in events] == [e.logprobs for e in expected], "bit for bit"


@native
def test_the_native_stack_runs_quantised_layers(folders: dict[str, Path]) -> None:
    model, _ = opsin.load(folders[DENSE], device="cpu", dtype="bfloat16", quantize=8)
    assert model.decoder.native is not None
    kinds = {m.packed.format.kind for m in model.decoder.modules() if isinstance(m, Linear)}
    assert kinds == {"q8"}
    towers = [m for m in model.towers.modules() if isinstance(m, Linear)]
    assert {m.packed is None for m in towers} == {True, False}, "the patch layer stays as it is"
    assert sum(p.numel() for p in towers[0].parameters()) < model.num_parameters


def logits_of(model: Model, processor: Any) -> dict[int, float]:
    prompt = processor.prepare("What is in the picture?", images=[picture(1, 90, 70)])
    with engine_of(model, processor) as engine:
        (events,) = answers(engine, [prompt], count=1, logprobs=20)
    return dict(events[-1].logprobs[0].top)


@pytest.mark.parametrize("name", [DENSE, EXPERTS])
def test_without_native_kernels_plain_torch_gives_the_same(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    whole = opsin.load(folders[name], device="cpu", dtype="float32")
    figures.append(logits_of(*whole))
    monkeypatch.setattr(loading, "native_library", lambda: None)
    plain = opsin.load(folders[name], device="cpu", dtype="float32", quantize=8)
    packed = [m.packed for m in plain[0].decoder.modules() if isinstance(m, Linear)]
    assert any(isinstance(matrix, PlainMatrix) for matrix in packed)
    figures.append(logits_of(*plain))
    shared = figures[0].keys() & figures[1].keys()
    assert len(shared) > 10
    assert max(abs(figures[0][t] - figures[1][t]) for t in shared) < 0.5


def test_what_cannot_be_quantised_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="3 bits"):
        opsin.load(folders[DENSE], device="cpu", quantize=3)


@pytest.mark.parametrize(("bits", "narrow", "wide"), [(8, "q8", "q8"), (4, "q4", "q5")])
def test_what_is_sensitive_keeps_more_bits(
    folders: dict[str, Path], bits: int, narrow: str, wide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "quantised", lambda kind, _, most: quantised(kind, 1024, most))
    decoder = loading.build(folders[DENSE]).decoder
    while len(decoder.layers) < 16:
        decoder.layers.append(copy.deepcopy(decoder.layers[0]))
    formats = packing.quantised_formats(decoder, nn.Module(), bits)
    kept = {module: (form.kind, form.group) for module, form in formats.items()}
    layers = list(decoder.layers)
    few, more = (narrow, 128 if bits == 4 else 64), (wide, 64)
    for i, layer in enumerate(layers):
        inner = 0 < i < len(layers) - 1
        assert kept[layer.attention.qkv] == more
        for module in (layer.attention.out, layer.mlp.gate_up):
            assert kept[module] == (few if inner else more)
        assert kept[layer.mlp.down] == (more if i in (0, 1, 4, 7, 10, 13, 14, 15) else few)
    assert decoder.head is not None
    tables = ("q4", 32) if bits == 4 else ("q8", 64)
    assert kept[decoder.embedding] == kept[decoder.head] == tables


def test_groups_are_as_large_as_columns_allow() -> None:
    groups = [(640, 128), (576, 64), (96, 32), (40, 0)]
    for columns, group in groups:
        form = quantised("q4", columns)
        assert (form.kind, form.group) == ("q4" if group else "q8", group)
        assert quantised("q8", columns).group == min(group, 64)
        assert quantised("q4", columns, 32).group == min(group, 32)


def test_a_summary_says_what_is_kept_how(folders: dict[str, Path]) -> None:
    model = loading.build(folders[DENSE])
    formats = packing.quantised_formats(model.decoder, model.towers, 4)
    plain = packing.summary(model, {}, torch.bfloat16)
    small = packing.summary(model, formats, torch.bfloat16)
    assert plain.num_bytes == 2 * model.num_parameters
    assert sum(small.parameters.values()) == model.num_parameters
    assert small.num_bytes < plain.num_bytes
    assert "bfloat16" in small.parameters
