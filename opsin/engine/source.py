"""Makes and gathers what cross-attention layers read in one step: see `opsin.decoder.source`."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from opsin.decoder.cache import cache_slots
from opsin.decoder.source import SourceStep
from opsin.engine.model import Model
from opsin.engine.scheduler import Scheduled
from opsin.engine.sequence import Sequence
from opsin.families.base import Encoded

# Most tokens of prompts that go through an encoder together, one prompt at the least.
GROUP_TOKENS = 4096


def encode_prompts(model: Model, step: SequenceOf[Scheduled]) -> None:
    """Run the encoder over the prompts that start in a step, where one reads them.

    Their media are encoded already; the states take the place of what was encoded. A few prompts at
    a time go through, which bounds the memory between the layers.
    """
    starting = [s.sequence for s in step if s.start == 0]
    for group in _groups([s for s in starting if s.prompt.encoder_ids is not None]):
        texts = [sequence.prompt.text_ids for sequence in group]
        lengths = [len(ids) for ids in texts]
        flat = torch.tensor([token for ids in texts for token in ids], device=model.device)
        embeds = model.decoder.embed(flat)
        for sequence, own in zip(group, embeds.split(lengths), strict=True):
            for i, encoded in sequence.encoded.items():
                if encoded.embeds is not None:
                    rows = sequence.prompt.media[i].indices.to(own.device)
                    own[rows] = encoded.embeds.to(own.dtype)
        states = model.family.encode_prompts(model.towers, embeds, lengths)
        for sequence, own in zip(group, states.split(lengths), strict=True):
            sequence.encoded = {0: Encoded(None, source=own)}


def _groups(sequences: SequenceOf[Sequence]) -> Iterator[list[Sequence]]:
    """Sequences in runs of at most so many prompt tokens."""
    group: list[Sequence] = []
    taken = 0
    for sequence in sequences:
        length = len(sequence.prompt.text_ids)
        if group and taken + length > GROUP_TOKENS:
            yield group
            group, taken = [], 0
        group.append(sequence)
        taken += length
    if group:
        yield group


def source_step(
    step: SequenceOf[Scheduled], block_size: int, hidden: int, device: torch.device
) -> SourceStep | None:
    """The sources of a step's sequences, or None if none of them has one.

    Takes the encoded rows out of the sequences that start here.
    """
    if not any(s.sequence.num_source for s in step):
        return None
    states: list[Tensor] = [torch.empty(0, hidden, device=device)]
    mapping: list[int] = []
    ends = [0]
    slots: list[slice | Tensor] = []
    masks: list[Tensor | None] = []
    present: list[Tensor] = []
    seen: list[Tensor] = []
    for scheduled in step:
        sequence, count = scheduled.sequence, scheduled.sequence.num_source
        tokens = scheduled.end - scheduled.start
        if count and scheduled.start == 0:
            states += _taken(sequence)
            table = sequence.source_table
            mapping += [
                table[row // block_size] * block_size + row % block_size for row in range(count)
            ]
        ends.append(ends[-1] + tokens)
        slots.append(cache_slots(sequence.source_table, count, block_size, device))
        mask, sees = _views(scheduled)
        masks.append(None if mask is None or bool(mask.all()) else mask.to(device))
        present.append(torch.full((tokens, 1), count > 0))
        seen.append(sees)
    states = states[1:] or states
    return SourceStep(
        states=torch.cat(states).to(device),
        slot_mapping=torch.tensor(mapping, dtype=torch.long, device=device),
        query_start=ends,
        slots=slots,
        masks=masks,
        present=torch.cat(present).to(device),
        seen=torch.cat(seen).to(device),
    )


def _taken(sequence: Sequence) -> list[Tensor]:
    """The encoded rows of a sequence's media or prompt, in order; it no longer holds them."""
    rows = []
    for i in sorted(sequence.encoded):
        encoded = sequence.encoded[i]
        if encoded.source is not None:
            rows.append(encoded.source)
            if encoded.embeds is None:
                del sequence.encoded[i]
    assert sum(len(part) for part in rows) == sequence.num_source
    return rows


def _views(scheduled: Scheduled) -> tuple[Tensor | None, Tensor]:
    """What the tokens of one sequence see: (tokens, rows), None for all, and (tokens, 1)."""
    tokens = scheduled.end - scheduled.start
    source = scheduled.sequence.prompt.source
    if source is None:
        return None, torch.zeros(tokens, 1, dtype=torch.bool)
    places = torch.arange(scheduled.start, scheduled.end).clamp_max(len(source.view_of) - 1)
    chosen = source.view_of[places]  # generated tokens see what the prompt's last one does
    seen = chosen[:, None] >= 0
    return source.views[chosen] | ~seen, seen
