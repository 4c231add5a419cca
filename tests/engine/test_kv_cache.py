"""Quantised and windowed caches: close to the plain one, and the same in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opsin.decoder.cache import CacheFormat, PagedCache, sequence_slots
from opsin.decoder.config import (
    AttentionConfig,
    CrossAttentionConfig,
    DecoderConfig,
    DeltaNetConfig,
    LayerConfig,
    MLPConfig,
)
from opsin.decoder.layout import HOLE, BlockLayout, KeptTokens
from opsin.engine.blocks import BlockPool
from opsin.engine.fallback import FallbackEngine, FallbackModel
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.plan import CachePlan
from opsin.engine.scheduler import Scheduler
from opsin.engine.sequence import Sequence
from opsin.errors import InputError
from opsin.families.base import Prompt
from opsin.kernels import AttentionBatch, Kernels, PackedRows
from opsin.kernels.interface import attend
from opsin.kernels.packed_rows import dequantise, quantise
from opsin.types import SamplingParams
from tests.families.ours import answers, tokens
from tests.families.pictures import picture

BLOCK = 8
QUESTIONS = ("What?", "Describe the picture in detail.", "How many are there, and where?")
FORMS: dict[str, dict[str, int]] = {
    "8 bits": {"kv_bits": 8, "quantized_kv_start": 0},
    "4 bits": {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 0},
    "4 bits, late": {"kv_bits": 4, "quantized_kv_start": 21},
    "window": {"max_kv_size": 28},
    "window, 8 bits, late": {"kv_bits": 8, "quantized_kv_start": 19, "max_kv_size": 30},
}


def engine_of(loaded: tuple[Any, Any], **limits: Any) -> Engine:
    base: dict[str, Any] = {"memory": 1 << 24, "block_size": BLOCK, "media_cache": 0}
    return Engine(*loaded, EngineLimits(**{**base, "prefix_cache": False, **limits}))


def prompts(processor: Any) -> list[Prompt]:
    images = [[], [picture(1, 90, 70)], [picture(2, 60, 100), picture(3, 33, 31)]]
    return [processor.prepare(q, images=i) for q, i in zip(QUESTIONS, images, strict=True)]


def close(engine: Engine) -> None:
    engine.scheduler.pool.forget()
    engine.scheduler.check_integrity()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    engine.close()


# The same in any company.


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_neither_neighbours_nor_chunks_nor_cached_beginnings_change_an_answer(
    loaded: tuple[Any, Any], form: dict[str, int]
) -> None:
    asked = prompts(loaded[1])
    engine = engine_of(loaded, **form)
    alone = [tokens(answers(engine, [prompt], count=24)[0]) for prompt in asked]
    together = [tokens(events) for events in answers(engine, asked, count=24)]
    close(engine)
    assert together == alone
    engine = engine_of(loaded, **form, prefill_step_size=16, prefix_cache=True)
    for _ in range(2):  # the second time from what the first has left
        assert [tokens(events) for events in answers(engine, asked, count=24)] == alone
    longer = loaded[1].prepare(QUESTIONS[1] + " And then?", images=[picture(1, 90, 70)])
    (cached,) = answers(engine, [longer], count=8)
    assert cached[-1].usage.cached_tokens >= BLOCK
    close(engine)
    engine = engine_of(loaded, **form)
    assert tokens(answers(engine, [longer], count=8)[0]) == tokens(cached)
    close(engine)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_native_stack_gives_what_plain_torch_does(
    plain: tuple[Any, Any], native: tuple[Any, Any], form: dict[str, int]
) -> None:
    for prompt in prompts(plain[1]):
        figures = []
        for loaded in (plain, native):
            engine = engine_of(loaded, **form)
            (events,) = answers(engine, [prompt], count=1, logprobs=20)
            close(engine)
            figures.append(dict(events[-1].logprobs[0].top))
        shared = figures[0].keys() & figures[1].keys()
        assert len(shared) > 10
        # Where two values round to different codes, a step of 4 bits lies between them.
        most = 0.8 if form.get("kv_bits") == 4 else 0.25
        assert max(abs(figures[0][t] - figures[1][t]) for t in shared) < most


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (8, 64)])
def test_native_rows_are_those_of_the_twin(native: tuple[Any, Any], bits: int, group: int) -> None:
    """The first layer's keys and values do not depend on the cache: they can be compared."""
    (prompt,) = prompts(native[1])[1:2]
    wide = engine_of(native)
    packed = engine_of(native, kv_bits=bits, kv_group_size=group, quantized_kv_start=20)
    for engine in (wide, packed):
        answers(engine, [prompt], count=1)
    count, first = len(prompt.token_ids), packed.cache.layout.early_tokens
    assert 20 <= first < 28
    device = torch.device("cpu")
    for name in ("keys", "values"):
        rows, got = getattr(wide.cache, name)[0], getattr(packed.cache, name)[0]
        rows = rows.transpose(1, 2).flatten(0, 1)  # (slots, kv_heads, head_dim)
        # A lone request gets the first blocks, one after another.
        where = sequence_slots(list(range(99)), count, packed.cache.layout, device)
        codes, scales = quantise(rows[first:count], bits, got.scales.shape[2])
        assert torch.equal(got.plain[where.early], rows[:first])
        assert torch.equal(got.codes[where.late], codes)
        assert torch.equal(got.scales[where.late], scales)
    for engine in (wide, packed):
        close(engine)


@pytest.mark.parametrize(("bits", "most"), [(8, 0.03), (4, 0.8)])
def test_quantised_answers_are_close_to_plain_ones(
    plain: tuple[Any, Any], bits: int, most: float
) -> None:
    prompt = prompts(plain[1])[1]
    figures = []
    for form in ({}, {"kv_bits": bits, "quantized_kv_start": 0}):
        engine = engine_of(plain, **form)
        (events,) = answers(engine, [prompt], count=1, logprobs=20)
        close(engine)
        figures.append(dict(events[-1].logprobs[0].top))
    gaps = [abs(figures[0][t] - figures[1][t]) for t in figures[0].keys() & figures[1].keys()]
    assert 0 < max(gaps) < most


def test_tokens_before_the_start_are_not_quantised(loaded: tuple[Any, Any]) -> None:
    prompt = prompts(loaded[1])[1]
    engine = engine_of(loaded)
    exact = tokens(answers(engine, [prompt], count=24)[0])
    close(engine)
    engine = engine_of(loaded, kv_bits=4, quantized_kv_start=5000)
    assert tokens(answers(engine, [prompt], count=24)[0]) == exact
    close(engine)


def test_a_cache_of_fewer_bits_holds_more_tokens(loaded: tuple[Any, Any]) -> None:
    sizes = {}
    for bits in (16, 8, 4):
        engine = engine_of(loaded, kv_bits=bits, quantized_kv_start=0, memory=1 << 20)
        sizes[bits] = engine.scheduler.pool.num_blocks * BLOCK
        used = sum(_bytes(rows) for rows in (*engine.cache.keys, *engine.cache.values))
        per_block = BLOCK * PagedCache.bytes_per_token(
            loaded[0].decoder.config, loaded[0].dtype, engine.cache.form
        )
        assert (1 << 20) - per_block <= used <= (1 << 20) + per_block
        close(engine)
    assert sizes[16] * 1.3 < sizes[8] < sizes[4] / 1.3


def _bytes(rows: Tensor | PackedRows) -> int:
    parts = [rows.codes, rows.scales] if isinstance(rows, PackedRows) else [rows]
    return sum(part.numel() * part.itemsize for part in parts)


# Rows.


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_comes_back_within_a_step_of_its_group(bits: int, dtype: torch.dtype) -> None:
    rows = torch.randn(50, 3, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows[3] = 0.75  # a group without a range
    rows[4, :, 5] = 300.0  # one with a value far out
    codes, scales = quantise(rows, bits, 2)
    assert codes.shape == (50, 3, 128 * bits // 8)
    back = dequantise(codes, scales, bits)
    step = scales[..., 0].float().repeat_interleave(64, dim=-1)
    rounding = rows.float().abs() * torch.finfo(dtype).eps + 2e-6
    assert ((back.float() - rows.float()).abs() <= step + rounding).all()
    assert (back[3] == 0.75).all()


@pytest.mark.parametrize("form", [CacheFormat(8), CacheFormat(4, 32), CacheFormat(4, 128, 20)])
def test_attention_reads_what_was_written(form: CacheFormat) -> None:
    """The native rows are the twin's, bit by bit; attention over them is that over plain rows."""
    layer = LayerConfig(AttentionConfig(4, 2, 128, None), MLPConfig(16))
    config = DecoderConfig(10, 32, (layer,), 100)
    cache = PagedCache(config, 12, 16, torch.bfloat16, torch.device("cpu"), form=form)
    keys, values = cache.keys[0], cache.values[0]
    assert isinstance(keys, PackedRows)
    assert isinstance(values, PackedRows)
    generator = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 70, 2, 128, generator=generator).bfloat16()
    table = torch.randperm(12, generator=generator).tolist()
    mapping = torch.tensor([cache.layout.slot(table, p) for p in range(70)])
    Kernels().write_kv(key, value, keys, values, mapping)
    assert cache.layout.early_tokens == (20 if form.start else 0)
    where = sequence_slots(table, 70, cache.layout, torch.device("cpu"))
    batch = AttentionBatch(
        mapping, [0, 3], [70], [where.early], torch.tensor([table]), 16, late_slots=[where.late]
    )
    read = batch.rows(keys, 0)
    first = cache.layout.early_tokens
    groups = 128 // form.group
    assert torch.equal(read[:first], key[:first])
    packed = dequantise(*quantise(key[first:], form.bits, groups), form.bits)
    assert torch.equal(read[first:], packed)
    query = torch.randn(3, 4, 128, generator=generator).bfloat16()
    mask = torch.arange(70)[None] <= torch.arange(67, 70)[:, None]
    want = attend(query, read, batch.rows(values, 0), mask, 0.1, None, None)
    assert torch.equal(Kernels().paged_attention(query, keys, values, batch, scale=0.1), want)


@pytest.mark.parametrize(
    ("form", "heads", "names"),
    [
        ({"bits": 5}, 64, "kv_bits cannot be 5"),
        ({"bits": 8, "group": 48}, 64, "kv_group_size cannot be 48"),
        ({"bits": 8, "group": 64}, 80, "its heads have 80 values"),
        ({"bits": 4, "group": 128}, 64, ""),
    ],
)
def test_what_a_format_takes(form: dict[str, int], heads: int, names: str) -> None:
    layer = LayerConfig(AttentionConfig(4, 2, heads, None), MLPConfig(16))
    config = DecoderConfig(10, 32, (layer,), 100)
    if "cannot" in names:
        with pytest.raises(InputError, match=names):
            CacheFormat(**form)
        return
    assert CacheFormat(**form).why_not(config) == names


# Windows.


def _visible_in_window(position: int, window: int) -> list[int]:
    return [key for key in range(position + 1) if key < 4 or key > position - (window - 4)]


def test_a_window_is_a_mask_over_all_of_the_sequence(
    plain: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow way: everything is kept, and each token's keys are picked one by one."""
    window = 24
    asked = prompts(plain[1])
    engine = engine_of(plain, max_kv_size=window, prefill_step_size=10)
    fast = [tokens(events) for events in answers(engine, asked, count=40)]
    close(engine)

    def picked(
        self: Kernels,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: AttentionBatch,
        *,
        scale: float,
        **options: Any,
    ) -> Tensor:
        assert not any(options.values())
        out = torch.empty_like(query)
        for i, context in enumerate(batch.context_lens):
            start, end = batch.query_start[i], batch.query_start[i + 1]
            key, value = batch.rows(keys, i), batch.rows(values, i)
            for row in range(start, end):
                seen = _visible_in_window(context - end + row, window)
                one = query[row : row + 1]
                out[row : row + 1] = attend(one, key[seen], value[seen], None, scale, None, None)
        return out

    monkeypatch.setattr(Kernels, "paged_attention", picked)
    engine = engine_of(plain)
    assert [tokens(events) for events in answers(engine, asked, count=40)] == fast
    close(engine)


def test_a_window_as_long_as_the_sequence_changes_nothing(loaded: tuple[Any, Any]) -> None:
    (prompt,) = prompts(loaded[1])[:1]
    found = []
    for form in ({}, {"max_kv_size": len(prompt.token_ids) + 20}):
        engine = engine_of(loaded, **form)
        found.append(tokens(answers(engine, [prompt], count=20)[0]))
        close(engine)
    assert found[0] == found[1]


def test_an_endless_answer_holds_no_more_memory(loaded: tuple[Any, Any]) -> None:
    engine = engine_of(loaded, max_kv_size=32, prefill_step_size=16, max_context=2000)
    assert engine.scheduler.kept is not None
    most = engine.scheduler.kept.blocks_for(engine.cache.layout, 2000, 16)
    assert engine.scheduler.pool.num_blocks == 64 * most
    stream = engine.stream(prompts(loaded[1])[0], SamplingParams(max_tokens=400, ignore_eos=True))
    held = 0
    for _ in stream:
        held = max(held, engine.scheduler.pool.num_blocks - engine.scheduler.pool.num_free)
    assert 0 < held <= most < 400 // BLOCK
    close(engine)


@pytest.mark.parametrize("name", ["reads pictures", "recurrent", "small"])
def test_a_window_is_refused_where_it_makes_no_sense(name: str) -> None:
    layer = LayerConfig(AttentionConfig(4, 2, 64, None), MLPConfig(16))
    config = DecoderConfig(10, 32, (layer,), 100)
    if name == "small":
        with pytest.raises(InputError, match="max_kv_size cannot be 4"):
            EngineLimits(max_kv_size=4).kept_tokens(config)
        return
    kind: DeltaNetConfig | CrossAttentionConfig = DeltaNetConfig(2, 2, 8, 8, 4)
    if name == "reads pictures":
        kind = CrossAttentionConfig(4, 2, 64)
    layers: tuple[LayerConfig, ...] = (LayerConfig(kind, MLPConfig(16)), layer)
    layers = layers[:1] if name == "recurrent" else layers
    with pytest.raises(InputError, match="cannot have a window"):
        EngineLimits(max_kv_size=64).kept_tokens(DecoderConfig(10, 32, layers, 100))


@pytest.mark.parametrize("limits", [{"kv_bits": 8}, {"max_kv_size": 64}])
def test_a_model_of_transformers_keeps_its_own_cache(limits: dict[str, int]) -> None:
    model = FallbackModel.__new__(FallbackModel)  # refused before anything of it is looked at
    with pytest.raises(InputError, match=f"{next(iter(limits))} cannot be used"):
        FallbackEngine(model, None, EngineLimits(**limits))


# Bookkeeping.


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 9),
    early_blocks=st.integers(0, 5),
    early_size=st.integers(1, 9),
    count=st.integers(0, 90),
)
def test_a_layout_numbers_every_token_once(
    size: int, early_blocks: int, early_size: int, count: int
) -> None:
    layout = BlockLayout(size, early_blocks, early_size, packed=True)
    blocks = layout.blocks_for(count)
    assert blocks == 0 or layout.start(blocks - 1) < count <= layout.start(blocks)
    assert layout.start(layout.full_blocks(count)) <= count
    assert count < layout.start(layout.full_blocks(count) + 1)
    table = list(range(3, 3 + blocks))[::-1]
    slots = [layout.slot(table, token) for token in range(count)]
    assert len(set(slots)) == count
    where = sequence_slots(table, count, layout, torch.device("cpu"))
    every = torch.arange(100 * max(size, early_size))
    early, late = every[where.early].tolist(), every[where.late].tolist()
    assert early + [-1 - slot for slot in late] == slots


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    blocks=st.integers(14, 30),
    last=st.integers(1, 12),
    early=st.integers(0, 3),
    budget=st.integers(1, 12),
    prefix_cache=st.booleans(),
)
def test_what_a_token_sees_is_held_and_nothing_is_lost(
    lengths: list[int], blocks: int, last: int, early: int, budget: int, prefix_cache: bool
) -> None:
    layout, kept = BlockLayout(4, early, 2, packed=True), KeptTokens(4, last)
    plan = Scheduler(
        BlockPool(blocks),
        layout,
        max_num_seqs=3,
        max_num_batched_tokens=budget,
        prefix_cache=prefix_cache,
        kept=kept,
    )
    wanted = 30
    left = set()
    for number, length in enumerate(lengths):
        prompt = Prompt([7] * length, torch.arange(length)[None], length, [], [])
        if plan.can_ever_run(length + wanted + 1):
            left.add(number)
            plan.add(Sequence.start(number, prompt, SamplingParams()))
    for _ in range(3000):
        if not plan.has_work:
            break
        step = plan.schedule()
        assert step
        for s in step:
            for token in range(s.start, s.end):
                for key in range(token + 1):
                    if key < 4 or key > token - last:
                        index = layout.blocks_for(key + 1) - 1
                        assert s.sequence.block_table[index] != HOLE
        plan.computed(step)
        plan.check_integrity()
        for s in step:
            if s.samples:
                s.sequence.token_ids.append(0)
                if s.sequence.num_generated == wanted:
                    plan.finish(s.sequence)
                    left.discard(s.sequence.request_id)
    assert not left
    plan.pool.forget()
    plan.check_integrity()


def test_the_plan_counts_the_bytes_of_the_format() -> None:
    layer = LayerConfig(AttentionConfig(4, 2, 64, None), MLPConfig(16))
    config = DecoderConfig(10, 32, (layer,) * 3, 100)
    per_token = {
        bits: PagedCache.bytes_per_token(config, torch.bfloat16, CacheFormat(bits))
        for bits in (16, 8, 4)
    }
    assert per_token == {16: 3 * 2 * 2 * 128, 8: 3 * 2 * 2 * 68, 4: 3 * 2 * 2 * 36}
    limits: dict[str, Any] = {"block_size": 32, "max_num_seqs": 4, "max_context": 10_000}
    plans = {
        bits: CachePlan.of(config, torch.bfloat16, 10**6, **limits, form=CacheFormat(bits))
        for bits in (16, 8, 4)
    }
    for bits, plan in plans.items():
        assert plan.num_blocks == -(-(10**6 // per_token[bits]) // 32)
