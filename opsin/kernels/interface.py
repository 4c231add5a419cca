"""The arithmetic that models are made of, in plain torch: what faster kernels override, and their
twin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.kernels import recurrence
from opsin.kernels.packed_rows import CacheRows, PackedRows

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the new tokens of one step stand, and which cached keys each sequence reads.

    Letters: t new tokens of all sequences, s sequences. `slot_mapping` (t,) is the cache slot that
    each new token's key and value go to. Sequence i owns the new tokens query_start[i] up to
    query_start[i + 1] and reads context_lens[i] keys, which lie in slots[i]: a slice when its
    blocks are neighbours, else an index tensor. `block_tables` (s, blocks) holds the same as block
    numbers.

    Where a cache quantises, late_slots[i] are the slots of sequence i's quantised rows, and
    slots[i] those of the plain rows before them. With `kept` (first, last) a token sees only the
    first keys of its sequence and the last ones, itself included: key_positions[i] are then the
    positions of the keys in slots[i] and late_slots[i], None where all are there.

    `visible_until` (t,), if given, is the first key position that each new token may no longer see;
    without it attention is causal. `visible_from` (t,), if given, is a key position from which on
    the token sees keys even if its layer's window begins later. unseen[i], if given, is True for
    the (new tokens, keys) of sequence i of which the one does not see the other, although that lies
    in its range; it holds later keys alone. `state_slots` (s,) says where
    recurrent layers keep each sequence's state.
    """

    slot_mapping: Tensor
    query_start: list[int]
    context_lens: list[int]
    slots: list[slice | Tensor]
    block_tables: Tensor
    block_size: int
    visible_until: Tensor | None = None
    visible_from: Tensor | None = None
    state_slots: Tensor | None = None
    late_slots: list[slice | Tensor] | None = None
    kept: tuple[int, int] | None = None
    key_positions: list[Tensor | None] | None = None
    unseen: list[Tensor | None] | None = None

    def rows(self, cache: CacheRows, sequence: int) -> Tensor:
        """The cached rows that a sequence reads: (keys, kv_heads, dim)."""
        slots = self.slots[sequence]
        if isinstance(cache, Tensor):
            return cache[slots]
        assert self.late_slots is not None
        return cache.read(slots, self.late_slots[sequence])


class Kernels:
    """Plain torch implementation of every operation; other devices and libraries override some.

    A kernel may assume contiguous inputs in one dtype and promises its result in that dtype, with
    sums kept in float32 where torch does so.
    """

    name = "torch"
    has_native_products = False  # whether the native library multiplies in bfloat16

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None = None,
    ) -> Tensor:
        """x (tokens, in) times weight (out, in) transposed, plus bias (out,), then `activation`."""
        out = F.linear(x, weight, bias)
        return out if activation is None else self.activation(out, activation)

    def expert_linear(self, x: Tensor, weight: Tensor, expert_ids: Tensor) -> Tensor:
        """Row i of x (rows, in) times weight[expert_ids[i]] transposed; weight (experts, out, in).

        expert_ids (rows,) are in rising order. Returns (rows, out).
        """
        counts = expert_ids.bincount(minlength=weight.shape[0]).tolist()
        out = torch.empty(x.shape[0], weight.shape[1], dtype=x.dtype, device=x.device)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                out[rows] = self.linear(x[rows], weight[expert], None)
                start += count
        return out

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Root-mean-square norm over the last axis (arXiv:1910.07467), in float32 inside.

        A float32 weight may meet a narrower x: the product is then rounded once, at the end.
        """
        if weight is not None and weight.dtype != x.dtype:
            return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, eps).to(x.dtype)
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """Layer norm over the last axis (arXiv:1607.06450)."""
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def activation(self, x: Tensor, kind: Activation) -> Tensor:
        """The named element-wise activation."""
        match kind:
            case "silu":
                return F.silu(x)
            case "gelu":
                return F.gelu(x)
            case "gelu_tanh":
                return F.gelu(x, approximate="tanh")
            case "quick_gelu":
                return x * torch.sigmoid(1.702 * x)
            case "relu":
                return F.relu(x)
            case "relu2":
                return F.relu(x).square()

    def gated(self, gate_up: Tensor, kind: Activation) -> Tensor:
        """activation(gate) * up, where gate_up is (tokens, 2 * hidden): gate, then up."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate, kind) * up

    def rope(
        self, x: Tensor, cos: Tensor, sin: Tensor, pairs: Literal["half", "adjacent"]
    ) -> Tensor:
        """Rotate the first 2 * f features of x (tokens, heads, dim) by cos, sin (tokens, f),
        float32.

        "half" pairs feature i with i + f (the Transformers layout), "adjacent" 2i with 2i + 1.
        """
        rotary_dim = 2 * cos.shape[-1]
        head, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
        cos, sin = cos[:, None], sin[:, None]  # (tokens, 1, f)
        if pairs == "half":
            a, b = head.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        else:
            a, b = head[..., 0::2], head[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        turned = turned.to(x.dtype)
        return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)

    def write_kv(
        self, key: Tensor, value: Tensor, keys: CacheRows, values: CacheRows, slot_mapping: Tensor
    ) -> None:
        """Store key and value (tokens, kv_heads, dim) in the cache (slots, kv_heads, dim)."""
        for rows, cache in ((key, keys), (value, values)):
            if isinstance(cache, PackedRows):
                cache.write(rows, slot_mapping)
            else:
                cache.index_copy_(0, slot_mapping, rows)

    def paged_attention(
        self,
        query: Tensor,
        keys: CacheRows,
        values: CacheRows,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Attention of query (tokens, heads, dim) over each sequence's cached keys and values.

        A token at position p sees the keys 0..p, of them the last `window` if that is set, or those
        from the last multiple of `chunk` on, and those before its `visible_until`. Scores are
        capped as soft_cap * tanh(score / soft_cap). `sinks` (heads,) are extra logits in each
        softmax that carry no value. Returns (tokens, heads, dim).
        """
        out = torch.empty(
            *query.shape[:-1], values.shape[-1], dtype=query.dtype, device=query.device
        )
        for i, context in enumerate(batch.context_lens):
            start, end = batch.query_start[i], batch.query_start[i + 1]
            until = None if batch.visible_until is None else batch.visible_until[start:end]
            since = None if batch.visible_from is None else batch.visible_from[start:end]
            places = None if batch.key_positions is None else batch.key_positions[i]
            mask = _visible(
                end - start,
                context,
                window,
                until,
                query.device,
                chunk,
                since,
                batch.kept,
                places,
            )
            unseen = None if batch.unseen is None else batch.unseen[i]
            if unseen is not None:
                assert mask is not None, "what a token does not see lies after it"
                mask = mask & ~(unseen if places is None else unseen[:, places])
            key = batch.rows(keys, i)
            value = key if values is keys else batch.rows(values, i)
            out[start:end] = attend(query[start:end], key, value, mask, scale, soft_cap, sinks)
        return out

    def source_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        query_start: list[int],
        slots: list[slice | Tensor],
        masks: list[Tensor | None],
        *,
        scale: float,
    ) -> Tensor:
        """Attention of query (tokens, heads, dim) over each sequence's source rows in the cache.

        Sequence i owns the tokens query_start[i] up to query_start[i + 1] and reads keys[slots[i]]
        where masks[i] (tokens, rows) is True. Zero where there are no rows.
        """
        out = torch.zeros_like(query)
        for i, rows in enumerate(slots):
            start, end = query_start[i], query_start[i + 1]
            if keys[rows].shape[0]:
                own = query[start:end]
                out[start:end] = attend(own, keys[rows], values[rows], masks[i], scale, None, None)
        return out

    def causal_conv(
        self, x: Tensor, weight: Tensor, state: Tensor, batch: AttentionBatch
    ) -> Tensor:
        """Each channel of x (tokens, channels) convolved with its own kernel over its sequence.

        weight (channels, kernel). state (slots, kernel - 1, channels) holds the last inputs of each
        sequence and moves on.
        """
        slots = batch.state_slots
        assert slots is not None
        if x.shape[0] == slots.shape[0]:  # one token of each sequence
            out, after = recurrence.causal_conv(x[:, None], weight, state[slots])
            state[slots] = after.to(state.dtype)
            return out[:, 0]
        parts = []
        for i, slot in enumerate(slots.tolist()):
            run = x[batch.query_start[i] : batch.query_start[i + 1]]
            out, after = recurrence.causal_conv(run[None], weight, state[slot : slot + 1])
            state[slot] = after[0].to(state.dtype)
            parts.append(out[0])
        return torch.cat(parts)

    def gated_delta(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        decay: Tensor,
        write: Tensor,
        memory: Tensor,
        batch: AttentionBatch,
    ) -> Tensor:
        """The gated delta rule (arXiv:2412.06464) over each sequence's new tokens, in float32.

        query and key (tokens, key_heads, key_dim), made unit vectors here; value (tokens, heads,
        value_dim); decay, a logarithm, and write strength (tokens, heads). memory (slots, heads,
        key_dim, value_dim) holds each sequence's state and moves on. Returns value's shape.
        """
        slots = batch.state_slots
        assert slots is not None
        groups = value.shape[1] // key.shape[1]
        query = recurrence.unit(query) * query.shape[-1] ** -0.5
        query, key = (
            x.repeat_interleave(groups, dim=1) for x in (query, recurrence.unit(key))
        )  # (tokens, heads, key_dim)
        parts = (query, key, value.float(), decay, write)
        if value.shape[0] == slots.shape[0]:
            out, after = recurrence.delta_step(*parts, memory[slots])
            memory[slots] = after
            return out.to(value.dtype)
        out = torch.empty(value.shape, dtype=torch.float32, device=value.device)
        for i, slot in enumerate(slots.tolist()):
            first, last = batch.query_start[i], batch.query_start[i + 1]
            for start in range(first, last, recurrence.CHUNK):
                rows = slice(start, min(start + recurrence.CHUNK, last))
                q, k, v, d, w = (x[rows].transpose(0, 1) for x in parts)
                result, memory[slot] = recurrence.delta_chunk(q, k, v, d, w, memory[slot])
                out[rows] = result.transpose(0, 1)
        return out.to(value.dtype)

    def dense_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: list[int],
        *,
        scale: float,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Bidirectional attention inside consecutive runs of `lengths` tokens, as towers use it.

        query (tokens, heads, dim); key and value (tokens, kv_heads, dim). `bias`, added to the
        scores, broadcasts to (runs, heads, length, length) and asks for runs of one length.
        Returns (tokens, heads, dim).
        """
        if len(set(lengths)) == 1:
            runs = len(lengths)
            q, k, v = (x.unflatten(0, (runs, -1)).transpose(1, 2) for x in (query, key, value))
            if k.shape[1] != q.shape[1]:
                k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
            return out.transpose(1, 2).flatten(0, 1)
        if bias is not None:
            raise ValueError("a bias asks for runs of one length")
        pieces = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return torch.cat([attend(q, k, v, None, scale, None, None) for q, k, v in pieces])


def _visible(
    queries: int,
    context: int,
    window: int | None,
    until: Tensor | None,
    device: torch.device,
    chunk: int | None = None,
    since: Tensor | None = None,
    kept: tuple[int, int] | None = None,
    places: Tensor | None = None,
) -> Tensor | None:
    """Which of `context` keys the last `queries` positions see: (queries, context), None for
    all. Where some keys are gone, `places` are the positions of the others.
    """
    whole = (window is None or context <= window) and (chunk is None or context <= chunk)
    whole = whole and (kept is None or context <= sum(kept))
    if queries == 1 and until is None and whole:
        return None
    position = torch.arange(context - queries, context, device=device)[:, None]
    key = (torch.arange(context, device=device) if places is None else places)[None, :]
    limit = position + 1 if until is None else until[:, None]
    visible = key < limit
    if window is not None:
        begin = position - window + 1
        if since is not None:
            begin = torch.minimum(begin, since[:, None])
        visible &= key >= begin
    if chunk is not None:
        visible &= key >= position // chunk * chunk
    if kept is not None:
        begin = position - kept[1] + 1
        if since is not None:
            begin = torch.minimum(begin, since[:, None])
        visible &= (key >= begin) | (key < kept[0])
    return visible


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence's attention: query (q, heads, dim), key and value (k, kv_heads, dim).

    mask (q, k) is True where a query may look. Returns (q, heads, dim) in the query's dtype.
    """
    kv_heads = key.shape[1]
    groups = query.shape[1] // kv_heads
    if query.shape[0] == 1 or soft_cap is not None or sinks is not None:
        return _attend_by_group(query, key, value, mask, scale, soft_cap, sinks)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, length, dim)
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)


def _attend_by_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention in float32 without repeating the keys: heads that share a key stand side by
    side.
    """
    queries, heads, _ = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    q = query.float().mul(scale).unflatten(1, (kv_heads, groups))  # (q, kv_heads, groups, dim)
    q = q.permute(1, 2, 0, 3).flatten(1, 2)  # (kv_heads, groups * q, dim)
    scores = q @ key.float().permute(1, 2, 0)  # (kv_heads, groups * q, k)
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    if mask is not None:
        scores = scores.unflatten(1, (groups, queries)).masked_fill(~mask, -torch.inf).flatten(1, 2)
    if sinks is not None:
        extra = sinks.float().view(kv_heads, groups, 1, 1).expand(-1, -1, queries, 1).flatten(1, 2)
        weights = torch.cat((scores, extra), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    out = weights @ value.float().transpose(0, 1)  # (kv_heads, groups * q, dim)
    out = out.unflatten(1, (groups, queries)).permute(2, 0, 1, 3).flatten(1, 2)
    return out.to(query.dtype)
