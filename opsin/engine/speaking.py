"""Requests that say more than the vocabulary's tokens, beside those that do not, in one step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from opsin.decoder.decoder import Decoder
from opsin.engine.scheduler import Scheduled


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
                embeds[rows] = speaker.embeds(ids[rows]).to(embeds.dtype)
        start = end
    return embeds


def scored(decoder: Decoder, step: SequenceOf[Scheduled], stream: Tensor) -> list[Tensor]:
    """The logits, float32, of each request of a step that samples: as many as it has tokens.

    stream (rows, hidden) is the decoder's last, before its norm, for the same requests.
    """
    logits = decoder.logits(decoder.norm(stream))
    sampling = [scheduled.sequence for scheduled in step if scheduled.samples]
    rows = []
    for i, sequence in enumerate(sampling):
        row = logits[i]
        if sequence.speaker is not None:
            row = sequence.speaker.scores(stream[i], row, sequence.output_ids)
        rows.append(row)
    return rows


def likeliest(logits: Tensor | SequenceOf[Tensor]) -> list[int]:
    """The largest of each row of logits."""
    if not len(logits):
        return []
    if isinstance(logits, Tensor):
        found: list[int] = logits.argmax(dim=-1).tolist()
        return found
    return torch.stack([row.argmax() for row in logits]).tolist()
