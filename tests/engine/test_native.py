"""A model on the native CPU stack: the same model, and the same answer in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import opsin
from opsin.decoder.config import AttentionConfig, DecoderConfig, LayerConfig, MLPConfig
from opsin.decoder.native import LOOKED_UP, NativeStack, table_of, why_not
from opsin.engine import model as loading
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.model import Model
from opsin.families.base import Prompt
from opsin.kernels import cpu
from opsin.nn.linear import Embedding
from opsin.types import SamplingParams
from tests.families.checkpoints import write_checkpoint
from tests.families.ours import answers, tokens
from tests.families.pictures import picture
from tests.families.zoo import CASES

pytestmark = pytest.mark.skipif(cpu.load() is None, reason=f"not built: {cpu.why_missing()}")

QUESTIONS = ("What?", "Describe the picture in detail.", "How many are there, and where?")


COVERED = ("qwen3_vl-published_tied", "qwen3_vl-saved_untied", "internvl-small")


@pytest.fixture(scope="module", params=[case for case in CASES if case.name in COVERED], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param.name))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return opsin.load(folder, device="cpu", dtype="bfloat16")


def prompts(processor: Any) -> list[Prompt]:
    images = [[], [picture(1, 90, 70)], [picture(2, 60, 100), picture(3, 33, 31)]]
    return [processor.prepare(q, images=i) for q, i in zip(QUESTIONS, images, strict=True)]


def engine_of(model: Model, processor: Any, step: int = 2048) -> Engine:
    limits = EngineLimits(
        prefill_step_size=step, memory=1 << 24, block_size=8, prefix_cache=False, media_cache=0
    )
    return Engine(model, processor, limits)


def test_the_weights_are_packed_and_their_tensors_gone(loaded: tuple[Model, Any]) -> None:
    model, _ = loaded
    assert model.decoder.native is not None
    left = sum(p.numel() for name, p in model.decoder.named_parameters() if "norm" not in name)
    assert left == (0 if model.decoder.head is None else model.decoder.embedding.weight.numel())
    assert model.num_parameters > left


def test_angles_looked_up_are_those_computed(loaded: tuple[Model, Any]) -> None:
    decoder = loaded[0].decoder
    assert isinstance(decoder.native, NativeStack)
    assert decoder.angles is not None
    places = [LOOKED_UP - 1, 0, 77, 77]
    made, rows = decoder.native.turned(places, decoder.angles)
    assert rows == places
    table = decoder.angles.at(torch.tensor(places).expand(3, -1))
    for got, config in zip(made.pairs, decoder.native.ropes, strict=True):
        assert all(map(torch.equal, (part[places] for part in got), table[config]))
    beyond, rows = decoder.native.turned([LOOKED_UP, 5], decoder.angles)
    assert rows is None
    table = decoder.angles.at(torch.tensor([LOOKED_UP, 5]).expand(3, -1))
    for got, config in zip(beyond.pairs, decoder.native.ropes, strict=True):
        assert all(map(torch.equal, got, table[config]))


def test_logprobs_are_those_of_plain_torch(
    folder: Path, loaded: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "native_library", lambda *_: None)
    plain, processor = opsin.load(folder, device="cpu", dtype="float32")
    assert plain.decoder.native is None
    for prompt in prompts(processor):
        figures = []
        for model in (plain, loaded[0]):
            with engine_of(model, processor) as engine:
                (events,) = answers(engine, [prompt], count=1, logprobs=20)
            figures.append(dict(events[-1].logprobs[0].top))
        shared = figures[0].keys() & figures[1].keys()
        assert len(shared) > 10
        # bfloat16 keeps 8 bits: the weights alone are off by up to 1 part in 256.
        assert max(abs(figures[0][t] - figures[1][t]) for t in shared) < 0.25


def test_tokens_are_embedded_and_chosen_by_the_stack(
    loaded: tuple[Model, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    native = model.decoder.native
    assert isinstance(native, NativeStack)
    with engine_of(model, processor) as engine:
        expected = answers(engine, prompts(processor), logprobs=0)
    embedded, found, embed, compute = [], [], native.embed, native.compute
    monkeypatch.setattr(native, "embed", lambda ids: embedded.append(ids) or embed(ids))
    monkeypatch.setattr(native, "compute", lambda *a: found.append(compute(*a)) or found[-1])
    with engine_of(model, processor) as engine:
        for prompt, events in zip(prompts(processor), expected, strict=True):
            embedded.clear()
            (got,) = answers(engine, [prompt])
            assert tokens(got) == tokens(events)
            if native.takes_ids:
                assert len(embedded) == bool(prompt.media), "only pictures are put in by torch"
    assert all(logits is None and len(largest) < 2 for logits, largest in found)


def test_an_embedding_in_bfloat16_is_read_where_it_lies() -> None:
    library = cpu.load()
    assert library is not None
    embedding = Embedding(37, 64)
    embedding.weight.data = torch.randn(37, 64).bfloat16()
    table = table_of(library, embedding)
    assert table is not None
    assert torch.equal(table.rows(range(37), torch.float32), embedding.weight.float())
    embedding.weight.data[3] = 0
    assert not table.rows([3]).any(), "a copy"
    embedding.scale = 8.1  # its products are rounded to bfloat16
    assert table_of(library, embedding) is None


@pytest.mark.parametrize("step", [2048, 13])
def test_company_and_chunks_change_nothing(loaded: tuple[Model, Any], step: int) -> None:
    model, processor = loaded
    alone = []
    for prompt in prompts(processor):
        with engine_of(model, processor) as engine:
            alone += answers(engine, [prompt], logprobs=3)
    with engine_of(model, processor, step) as engine:
        together = answers(engine, [*prompts(processor), *prompts(processor)], logprobs=3)
    for expected, events in zip([*alone, *alone], together, strict=True):
        assert tokens(events) == tokens(expected)
        assert [e.logprobs for e in events] == [e.logprobs for e in expected], "bit for bit"


def test_two_engines_over_one_model_keep_their_caches_apart(loaded: tuple[Model, Any]) -> None:
    model, processor = loaded
    prompt = prompts(processor)[1]
    with engine_of(model, processor) as one, engine_of(model, processor) as other:
        first = one.stream(prompt, SamplingParams(max_tokens=24, ignore_eos=True))
        second = other.stream(prompt, SamplingParams(max_tokens=24, ignore_eos=True))
        assert tokens(list(first)) == tokens(list(second))


def test_what_is_not_covered_says_why() -> None:
    def decoder(**attention: Any) -> DecoderConfig:
        layer = LayerConfig(AttentionConfig(4, 2, 16, None, **attention), MLPConfig(64))
        return DecoderConfig(100, 64, (layer,), 128)

    assert why_not(decoder(qkv_bias=True, window=8, soft_cap=3.0)) == ""
    assert "output_gate" in why_not(decoder(output_gate=True))
    assert "chunk" in why_not(decoder(chunk=4))
    assert "24 features" in why_not(
        DecoderConfig(100, 64, (LayerConfig(AttentionConfig(4, 2, 16, None), MLPConfig(24)),), 128)
    )


def test_a_missing_library_is_said_once_at_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "load", lambda *_: None)
    monkeypatch.setattr(cpu, "why_missing", lambda: "no compiler")
    model, processor = opsin.load(folder, device="cpu", dtype="bfloat16")
    assert model.decoder.native is None
    assert [record.message for record in caplog.records if "no compiler" in record.message]
    with engine_of(model, processor) as engine:
        (events,) = answers(engine, prompts(processor)[:1], count=2)
    assert len(tokens(events)) == 2
    assert model.dtype == torch.bfloat16
