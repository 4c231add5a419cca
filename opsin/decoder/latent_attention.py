"""Softmax attention that keeps one small vector a token, of which every head makes its key and
value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.decoder.attention import StepContext
from opsin.decoder.config import AttentionConfig, LatentAttentionConfig
from opsin.kernels import AttentionBatch, CacheRows, Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import RMSNorm


class HeadMaps(nn.Module):
    """For each head, the maps from the kept vector to a key's plain part and to a value.

    One matrix (heads * (plain + value), latent), a head's rows after another's, as checkpoints
    have it.
    """

    def __init__(self, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.splits = config.plain_dim, config.value_dim
        rows = config.heads * sum(self.splits)
        self.weight = nn.Parameter(torch.empty(rows, config.latent), requires_grad=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The maps (heads, plain, latent) and (heads, value, latent)."""
        keys, values = self.weight.unflatten(0, (-1, sum(self.splits))).split(self.splits, dim=1)
        return keys, values


class LatentAttention(nn.Module):
    """See `LatentAttentionConfig`; adapters are not for it.

    Where a sequence has few new tokens, no head's keys are made: their map is applied to the query
    instead, so that all heads attend to what the cache holds, and the values' map to what attention
    returns. Where it has many, keys and values are written out, for narrower heads cost less then.
    """

    def __init__(
        self,
        kernels: Kernels,
        config: AttentionConfig,
        layer: int,
        hidden: int,
        eps: float,
        adapters: Sequence[tuple[int, float]] = (),
    ) -> None:
        super().__init__()
        assert isinstance(config, LatentAttentionConfig)
        assert config.rope is not None
        assert (config.kv_heads, config.head_dim) == (1, config.rope.dim + config.latent)
        assert not adapters
        del eps  # the norms within have their own
        self.kernels = kernels
        self.config = config
        self.rope = config.rope
        self.layer = layer
        wide = config.heads * (config.plain_dim + self.rope.dim)
        self.scale = config.scale or (config.plain_dim + self.rope.dim) ** -0.5
        rank, narrow = config.query_rank, config.rope.dim + config.latent
        self.query_norm = self.query_up = None
        self.query = Linear(
            kernels, hidden, rank or wide, bias=config.qkv_bias and rank is not None
        )
        if rank is not None:
            self.query_norm = RMSNorm(kernels, rank, config.latent_eps)
            self.query_up = Linear(kernels, rank, wide)
        self.latent = Linear(kernels, hidden, narrow, bias=config.qkv_bias)
        self.latent_norm = RMSNorm(kernels, config.latent, config.latent_eps)
        self.maps = HeadMaps(config)
        self.out = Linear(kernels, config.heads * config.value_dim, hidden, bias=config.out_bias)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape; the new vectors end up in the cache."""
        config, kernels, turning = self.config, self.kernels, self.rope.dim
        cos, sin = context.angles[self.rope]
        query = self._queries(x).unflatten(-1, (config.heads, -1))
        plain, turned = query.split((config.plain_dim, turning), dim=-1)
        turned = kernels.rope(turned.contiguous(), cos, sin, self.rope.pairs)
        latent, common = self.latent(x).split((config.latent, turning), dim=-1)
        row = torch.cat((common, self.latent_norm(latent.contiguous())), dim=-1)[:, None]
        row = kernels.rope(row, cos, sin, self.rope.pairs)
        rows, batch = context.cache.keys[self.layer], context.batch  # the values are among them
        kernels.write_kv(row, row, rows, rows, batch.slot_mapping)
        starts = batch.query_start
        counts = [end - start for start, end in pairwise(starts)]
        many = [i for i, count in enumerate(counts) if count >= config.many]
        if not many:
            values = self._within(plain, turned, rows, batch)
        elif len(many) == len(counts):
            values = self._written_out(plain, turned, rows, batch)
        else:
            values = plain.new_empty(*plain.shape[:2], config.value_dim)
            few = [i for i in range(len(counts)) if i not in set(many)]
            for sequences, attend in ((few, self._within), (many, self._written_out)):
                part, tokens = _part(batch, sequences, x.device)
                values[tokens] = attend(plain[tokens], turned[tokens], rows, part)
        return self.out(values.flatten(1))

    def _within(
        self, plain: Tensor, turned: Tensor, rows: CacheRows, batch: AttentionBatch
    ) -> Tensor:
        """Values (tokens, heads, value) by attention to the rows as they lie in the cache."""
        to_keys, to_values = self.maps()
        absorbed = torch.bmm(plain.transpose(0, 1), to_keys).transpose(0, 1)
        attended = self._attend(torch.cat((turned, absorbed), dim=-1), rows, rows, batch)
        latent = attended[..., self.rope.dim :].transpose(0, 1)  # (heads, tokens, latent)
        return torch.bmm(latent, to_values.transpose(1, 2)).transpose(0, 1)

    def _written_out(
        self, plain: Tensor, turned: Tensor, rows: CacheRows, batch: AttentionBatch
    ) -> Tensor:
        """The same by every head's own keys and values, made of all rows that are read."""
        config, turning = self.config, self.rope.dim
        held = [batch.rows(rows, i)[:, 0] for i in range(len(batch.context_lens))]
        common, latent = torch.cat(held).split((turning, config.latent), dim=-1)
        made = F.linear(latent, self.maps.weight).unflatten(-1, (config.heads, -1))
        key, value = made.split(self.maps.splits, dim=-1)
        key = torch.cat((common[:, None].expand(-1, config.heads, -1), key), dim=-1)
        # Attention is fast only where values are as wide as keys.
        width = max(key.shape[-1], config.value_dim)
        query = torch.cat((turned, plain), dim=-1)
        query, key, value = (
            F.pad(part, (0, width - part.shape[-1])) for part in (query, key, value)
        )
        dense = _side_by_side(batch, [len(part) for part in held])
        return self._attend(query, key, value, dense)[..., : config.value_dim]

    def _attend(
        self, query: Tensor, keys: CacheRows, values: CacheRows, batch: AttentionBatch
    ) -> Tensor:
        window = self.config.window
        return self.kernels.paged_attention(
            query, keys, values, batch, scale=self.scale, window=window
        )

    def _queries(self, x: Tensor) -> Tensor:
        """All heads' queries of x (tokens, hidden), side by side."""
        if self.query_norm is None or self.query_up is None:
            return self.query(x)
        return self.query_up(self.query_norm(self.query(x)))


def _part(
    batch: AttentionBatch, sequences: Sequence[int], device: torch.device
) -> tuple[AttentionBatch, Tensor]:
    """Some sequences of a batch, to be read alone, and where their new tokens stand in it."""
    starts = batch.query_start
    runs = [torch.arange(starts[i], starts[i + 1], device=device) for i in sequences]
    tokens, ends = torch.cat(runs), torch.tensor([0, *map(len, runs)]).cumsum(0).tolist()

    def of(values: Tensor | None, places: Tensor) -> Tensor | None:
        return None if values is None else values[places.to(values.device)]

    late, positions = batch.late_slots, batch.key_positions
    chosen = torch.tensor(sequences)
    part = dataclasses.replace(
        batch,
        slot_mapping=batch.slot_mapping[tokens],
        query_start=ends,
        context_lens=[batch.context_lens[i] for i in sequences],
        slots=[batch.slots[i] for i in sequences],
        block_tables=batch.block_tables[chosen.to(batch.block_tables.device)],
        visible_until=of(batch.visible_until, tokens),
        visible_from=of(batch.visible_from, tokens),
        state_slots=of(batch.state_slots, chosen),
        late_slots=None if late is None else [late[i] for i in sequences],
        key_positions=None if positions is None else [positions[i] for i in sequences],
    )
    return part, tokens


def _side_by_side(batch: AttentionBatch, lengths: Sequence[int]) -> AttentionBatch:
    """The batch over rows of its sequences that lie one sequence after another, in no cache."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    slots: list[slice | Tensor] = [slice(start, end) for start, end in pairwise(ends)]
    tables = [torch.arange(start, end) for start, end in pairwise(ends)]
    return dataclasses.replace(
        batch,
        slots=slots,
        late_slots=None,
        block_tables=nn.utils.rnn.pad_sequence(tables, batch_first=True).to(batch.block_tables),
        block_size=1,
    )
