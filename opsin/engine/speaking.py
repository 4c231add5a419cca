"""Requests that say more than the vocabulary's tokens, beside those that do not, in one step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from opsin.decoder.cache import PagedCache
from opsin.decoder.decoder import Decoder, Step
from opsin.engine.scheduler import Scheduled
from opsin.families.speaking import Speaker


def speaks(step: SequenceOf[Scheduled]) -> bool:
    """Whether any request of a step has tokens of its own."""
    return any(scheduled.sequence.speaker is not None for scheduled in step)


def embedded(decoder: Decoder, step: SequenceOf[Scheduled], ids: Tensor) -> Tensor:
    """The embeddings (tokens, hidden) of a step's tokens, each request's own by its speaker."""
    own = ids >= decoder.config.vocab_size
    embeds = decoder.embed(ids.masked_fill(own, 0))
    start = 0
    for scheduled in step:
        end = start + scheduled.end - scheduled.start
        speaker = scheduled.sequence.speaker
        if speaker is not None:
            rows = own[start:end].nonzero()[:, 0] + start
            if len(rows):
                tokens, shift = scheduled.sequence.token_ids, scheduled.start - start
                before = [tokens[row + shift - 1] for row in rows.tolist()]
                embeds[rows] = speaker.embeds(ids[rows], before).to(embeds.dtype)
        start = end
    return embeds


def read_places(step: SequenceOf[Scheduled]) -> list[tuple[Speaker, list[int], int]]:
    """The prompt's tokens whose stream a step's speakers have to see: each speaker, those places,
    and the row of the sequence's first token less its place.
    """
    found, start = [], 0
    for scheduled in step:
        speaker = scheduled.sequence.speaker
        if speaker is not None:
            places = [i for i in speaker.reads if scheduled.start <= i < scheduled.end]
            if places:
                found.append((speaker, places, start - scheduled.start))
        start += scheduled.end - scheduled.start
    return found


def scored(decoder: Decoder, cache: PagedCache, ready: Step, step: list[Scheduled]) -> list[Tensor]:
    """Run a step; the logits, float32, of each request that samples: as many as it has tokens.

    A request with drafts has a row for each of them too.
    """
    read, count = read_places(step), len(ready.logit_rows)
    if read:
        wanted = [place + shift for _, places, shift in read for place in places]
        more = torch.tensor(wanted, device=ready.logit_rows.device)
        ready = replace(ready, logit_rows=torch.cat((ready.logit_rows, more)))
    stream = decoder.stream(ready, cache)
    for speaker, places, _ in read:
        speaker.read(places, stream[count : count + len(places)])
        stream = torch.cat((stream[:count], stream[count + len(places) :]))
    logits = decoder.logits(decoder.norm(stream))
    sampling = [s.sequence for s in step if s.samples for _ in range(1 + len(s.drafts))]
    rows = []
    for i, sequence in enumerate(sampling):
        row = logits[i]
        if sequence.speaker is not None:
            row = sequence.speaker.scores(stream[i], row, sequence.output_ids)
        rows.append(row)
    return rows


def likeliest(logits: Tensor | SequenceOf[Tensor]) -> list[int]:
    """The largest of each row of logits."""
    if isinstance(logits, Tensor):
        if not logits.shape[0]:
            return []
        on_cpu = logits.device.type == "cpu"  # where NumPy takes a tenth of torch's time
        found: list[int] = (logits.numpy() if on_cpu else logits).argmax(-1).tolist()
        return found
    if not logits:
        return []
    return torch.stack([row.argmax() for row in logits]).tolist()
