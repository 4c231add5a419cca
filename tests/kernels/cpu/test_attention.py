"""Native attention equals the plain one and is bit for bit the same in any chunk."""

import pytest
import torch

from opsin.kernels.cpu.library import Paged
from opsin.kernels.interface import AttentionBatch, Kernels, attend
from opsin.kernels.native import NativeKernels

BLOCK = 16


def cache(contexts: list[int], kv_heads: int, dim: int, value_dim: int | None = None):
    """Keys and values of sequences in shuffled blocks; the unused slots hold NaN."""
    torch.manual_seed(sum(contexts) + dim)
    blocks = [-(-c // BLOCK) for c in contexts]
    order = torch.randperm(sum(blocks) + 3)
    tables = torch.zeros(len(contexts), max(blocks), dtype=torch.int32)
    keys = torch.full((order.numel() * BLOCK, kv_heads, dim), torch.nan, dtype=torch.bfloat16)
    values = keys.new_full((keys.shape[0], kv_heads, value_dim or dim), torch.nan)
    slots = []
    used = 0
    for i, (context, count) in enumerate(zip(contexts, blocks, strict=True)):
        tables[i, :count] = order[used : used + count].int()
        used += count
        position = torch.arange(context)
        slots.append(tables[i, position // BLOCK].long() * BLOCK + position % BLOCK)
        keys[slots[-1]] = torch.randn(context, kv_heads, dim).bfloat16()
        values[slots[-1]] = torch.randn(context, kv_heads, value_dim or dim).bfloat16()
    return keys, values, tables, slots


def reference(query, keys, values, slots, queries, ranges, scale, softcap=None, sinks=None):
    out, start = [], 0
    for where, count in zip(slots, queries, strict=True):
        position = torch.arange(where.numel())
        lo, hi = (r[start : start + count, None] for r in ranges)
        mask = (position >= lo) & (position < hi)
        piece = query[start : start + count].float()
        out.append(attend(piece, keys[where].float(), values[where].float(), mask, scale, softcap,
                          sinks))  # fmt: skip
        start += count
    return torch.cat(out)


def causal(contexts, queries, window=0):
    hi = torch.cat([torch.arange(c - q, c) + 1 for c, q in zip(contexts, queries, strict=True)])
    lo = (hi - window).clamp(min=0) if window else torch.zeros_like(hi)
    return lo.int(), hi.int()


def starts(queries):
    return torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)


def run(native, query, kv, contexts, queries, ranges, **options):
    keys, values, tables, _ = kv
    paged = Paged(starts(queries), torch.tensor(contexts), tables, BLOCK, *ranges)
    return native.paged_attention(query, keys, values, paged, **options)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (6, 1, 80), (2, 2, 128)])
@pytest.mark.parametrize("window", [0, 100])
def test_paged_attention_equals_the_plain_one(native, heads, kv_heads, dim, window):
    contexts, queries = [3, 700, 65], [3, 40, 1]
    kv = cache(contexts, kv_heads, dim)
    ranges = causal(contexts, queries, window)
    query = torch.randn(sum(queries), heads, dim).bfloat16()
    got = run(native, query.float(), kv, contexts, queries, ranges, scale=dim**-0.5)
    want = reference(query, kv[0], kv[1], kv[3], queries, ranges, dim**-0.5)
    assert (got - want).abs().max() < 0.012


def test_soft_cap_sinks_value_dim_and_bfloat16(native):
    contexts, queries = [150], [20]
    kv = cache(contexts, 2, 96, 48)
    ranges = causal(contexts, queries)
    query = torch.randn(20, 4, 96).bfloat16()
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    options = {"scale": 0.3, "softcap": 5.0, "sinks": sinks}
    got = run(native, query, kv, contexts, queries, ranges, **options)
    want = reference(query, kv[0], kv[1], kv[3], queries, ranges, 0.3, 5.0, sinks)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).abs().max() < 0.03


def test_spans_see_ahead(native):
    contexts, queries = [90], [90]
    kv = cache(contexts, 1, 32)
    lo, hi = causal(contexts, queries)
    hi[10:50] = 50
    query = torch.randn(90, 2, 32).bfloat16()
    got = run(native, query.float(), kv, contexts, queries, (lo, hi), scale=0.2)
    want = reference(query, kv[0], kv[1], kv[3], queries, (lo, hi), 0.2)
    assert (got - want).abs().max() < 0.012


@pytest.mark.parametrize(("window", "dim"), [(0, 64), (70, 64), (0, 80)])
def test_a_row_is_the_same_bits_in_any_chunk_batch_and_threads(native, window, dim):
    context = 1100
    kv = cache([context, 30], 2, dim)
    query = torch.randn(context, 4, dim)
    lo, hi = causal([context], [context], window)
    one = (kv[0], kv[1], kv[2][:1], kv[3][:1])
    whole = run(native, query, one, [context], [context], (lo, hi), scale=0.125)
    for start, end in ((0, 1), (5, 38), (511, 514), (600, 1100), (1099, 1100)):
        ranges = (lo[start:end], hi[start:end])
        part = run(native, query[start:end], one, [end], [end - start], ranges, scale=0.125)
        assert torch.equal(part, whole[start:end])
    both = run(
        native, query[[1099, 3]], kv, [context, 30], [1, 1],
        (lo[[1099, 3]], hi[[1099, 3]]), scale=0.125,
    )  # fmt: skip
    assert torch.equal(both[0], whole[1099])
    native.configure(native.isa, 3)
    again = run(native, query, one, [context], [context], (lo, hi), scale=0.125)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("dim", [64, 72])
def test_dense_attention_within_runs(native, dim):
    torch.manual_seed(dim)
    lengths = [1, 130, 64]
    q, k, v = torch.randn(3, sum(lengths), 3, dim).bfloat16()
    got = native.dense_attention(q.float(), k, v, lengths, scale=dim**-0.5)
    pieces = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    want = torch.cat(
        [attend(a.float(), b.float(), c.float(), None, dim**-0.5, None, None) for a, b, c in pieces]
    )
    assert (got - want).abs().max() < 0.012


@pytest.mark.parametrize("dim", [64, 72])
def test_dense_attention_of_long_runs_is_the_same_bits_whoever_takes_them(native, dim):
    torch.manual_seed(dim)
    lengths = [300, 1100, 20]  # a few tiles of tokens that see keys worth keeping; too many; few
    q, k, v = torch.randn(3, sum(lengths), 2, dim).bfloat16()
    got = native.dense_attention(q, k, v, lengths, scale=dim**-0.5)
    want = Kernels().dense_attention(q.float(), k.float(), v.float(), lengths, scale=dim**-0.5)
    assert (got - want).abs().max() < 0.03
    alone = native.dense_attention(q[:300], k[:300], v[:300], [300], scale=dim**-0.5)
    assert torch.equal(alone, got[:300])
    native.configure(native.isa, 3)
    again = native.dense_attention(q, k, v, lengths, scale=dim**-0.5)
    assert torch.equal(again, got)


def test_many_heads_on_one_key(native):
    kv = cache([40], 1, 32)
    query = torch.randn(2, 70, 32).bfloat16()
    ranges = causal([40], [2])
    got = run(native, query.float(), kv, [40], [2], ranges, scale=0.2)
    want = reference(query, kv[0], kv[1], kv[3], [2], ranges, 0.2)
    assert (got - want).abs().max() < 0.012


def test_no_tokens_and_nothing_visible(native):
    kv = cache([40], 1, 32)
    empty = run(native, torch.empty(0, 2, 32), kv, [40], [0], (None, None), scale=1.0)
    assert empty.shape == (0, 2, 32)
    zero = torch.zeros(1, dtype=torch.int32)
    blind = run(native, torch.ones(1, 2, 32), kv, [40], [1], (zero, zero), scale=1.0)
    assert torch.equal(blind, torch.zeros(1, 2, 32))


OPTIONS = {
    "causal": {},
    "windowed": {"window": 33},
    "chunked": {"chunk": 32},
    "capped": {"soft_cap": 3.0},
    "with sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0])},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_a_batch_equals_the_plain_kernels(native, option, spans, dtype):
    contexts, queries = [90, 40, 7], [50, 1, 7]
    keys, values, tables, slots = cache(contexts, 2, 64)
    query = torch.randn(sum(queries), 4, 64).to(dtype)
    until = since = None
    if spans:
        _, until = causal(contexts, queries)
        until[10:30], since = 70, torch.full((len(until),), 1 << 30)
        since[10:30] = 45
    batch = AttentionBatch(
        torch.empty(0), starts(queries).tolist(), contexts, slots, tables, BLOCK, until, since
    )
    keys, values = keys.to(dtype), values.to(dtype)
    chosen = {"scale": 0.2, **OPTIONS[option]}
    got = NativeKernels(native).paged_attention(query, keys, values, batch, **chosen)
    wide = (x.float() for x in (query, keys, values))
    want = Kernels().paged_attention(*wide, batch, **chosen)
    assert got.dtype == dtype
    assert (got - want).abs().max() < 0.03


def test_layers_of_a_step_share_their_ranges_and_steps_do_not(native):
    kernels = NativeKernels(native)
    for context in (20, 33):
        keys, values, tables, slots = cache([context], 2, 64)
        query = torch.randn(4, 4, 64).bfloat16()
        batch = AttentionBatch(torch.empty(0), [0, 4], [context], slots, tables, BLOCK)
        for window in (None, 5, None):
            got = kernels.paged_attention(query, keys, values, batch, scale=0.1, window=window)
            want = Kernels().paged_attention(query, keys, values, batch, scale=0.1, window=window)
            assert (got - want).abs().max() < 0.03


@pytest.mark.parametrize("lengths", [[64, 64], [1, 130, 64]])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_of_a_tower_equals_the_plain_kernels(native, lengths, kv_heads):
    torch.manual_seed(kv_heads)
    heads, dim = 4, 72
    joined = torch.randn(sum(lengths), heads + 2 * kv_heads, dim).bfloat16()
    parts = joined.split((heads, kv_heads, kv_heads), dim=1)
    got = NativeKernels(native).dense_attention(*parts, lengths, scale=0.1)
    want = Kernels().dense_attention(*(part.float() for part in parts), lengths, scale=0.1)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.03


def test_attention_with_a_bias_is_torch_s(native):
    query, key, value = torch.randn(3, 32, 2, 64).bfloat16()
    bias = torch.randn(2, 1, 16, 16).bfloat16()
    got = NativeKernels(native).dense_attention(query, key, value, [16, 16], scale=0.1, bias=bias)
    want = Kernels().dense_attention(query, key, value, [16, 16], scale=0.1, bias=bias)
    assert torch.equal(got, want)
