"""Runs one step of scheduled tokens through towers and decoder."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from itertools import accumulate

import torch
from torch import Tensor

from opsin.decoder.cache import PagedCache, sequence_slots
from opsin.decoder.decoder import NativeLayers, Step
from opsin.decoder.layout import HOLE, KeptTokens
from opsin.engine.media_cache import EncodedCache
from opsin.engine.model import Model
from opsin.engine.scheduler import Scheduled
from opsin.engine.sequence import Sequence
from opsin.engine.source import encode_prompts, source_step
from opsin.engine.speaking import embedded, scored, speaks
from opsin.families.base import Encoded, MediaInput
from opsin.kernels import AttentionBatch
from opsin.kernels.cpu.stack import StackStep
from opsin.kernels.memory import give_back_freed

LARGE_BYTES = 4 << 20  # of a medium's features, whose encoding takes long and much memory


class Runner:
    """Turns scheduled tokens into tensors, runs the model, returns logits."""

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        media_cache_bytes: int = 0,
        kept: KeptTokens | None = None,
    ) -> None:
        self.model = model
        self.decoder, self.device = model.decoder, model.device  # modules are slow to look into
        self.cache = cache
        self.kept = kept
        self.encoded = EncodedCache(media_cache_bytes)

    def run(
        self,
        step: list[Scheduled],
        when_ready: Callable[[], None] = lambda: None,
        likeliest_only: bool = False,
    ) -> tuple[Tensor | list[Tensor] | None, list[int] | None]:
        """Compute a step; logits (rows, vocab) float32 of the scheduled that sample, in order: of
        each the row of its last token, then those of its drafts; and the largest of each row.

        A list of rows where a request has tokens of its own. Without a native stack the largest are
        not looked for (None); with one there are only they where no more is asked. `when_ready` is
        called right before the decoder runs.
        """
        self.encode_media(step)
        native = self.decoder.native
        if native is None:
            return self._run(step, when_ready), None
        ready = self._native_step(step, native, not likeliest_only)
        return native.compute(ready, self.cache, when_ready)

    @torch.inference_mode()
    def _run(self, step: list[Scheduled], when_ready: Callable[[], None]) -> Tensor | list[Tensor]:
        encode_prompts(self.model, step)
        ready = self._step(step)
        when_ready()
        if not speaks(step):
            logits: Tensor = self.decoder(ready, self.cache)
            return logits
        return scored(self.decoder, self.cache, ready, step)

    def lacks_media(self, scheduled: Scheduled) -> bool:
        """Whether media are not encoded yet that a sequence's next tokens need."""
        return bool(_lacking(scheduled))

    def lacking(self, scheduled: Scheduled) -> list[tuple[Sequence, int]]:
        """Those media, by their number."""
        return [(scheduled.sequence, i) for i in _lacking(scheduled)]

    def encode_media(self, step: list[Scheduled]) -> None:
        """Run the towers over the media whose tokens this step meets first, by kind."""
        wanted = [each for scheduled in step for each in self.lacking(scheduled)]
        if wanted:
            self.encode(wanted)

    @torch.inference_mode()
    def encode(self, media: list[tuple[Sequence, int]]) -> None:
        """Run the towers over media, each of a sequence and by its number, by kind."""
        pending: dict[str, list[tuple[Sequence, int]]] = defaultdict(list)
        for sequence, i in media:
            pending[sequence.prompt.media[i].kind].append((sequence, i))
        for wanted in pending.values():
            started = time.perf_counter()
            items = [sequence.prompt.media[i] for sequence, i in wanted]
            encoded = self.encoded.encode(
                items,
                [sequence.prompt.cache_salt for sequence, _ in wanted],
                self._encode,
            )
            seconds = time.perf_counter() - started
            for (sequence, i), result in zip(wanted, encoded, strict=True):
                sequence.encoded[i] = result
                if sequence.speaker is not None:
                    sequence.speaker.see(i, result)
            for sequence in {id(sequence): sequence for sequence, _ in wanted}.values():
                sequence.timings.encode += seconds

    def _encode(self, items: SequenceOf[MediaInput]) -> list[Encoded]:
        """What the towers make of media. On a CPU one goes after another: there what a product's
        row is rounded to depends on how many rows there are, and company must change nothing.
        """
        family, towers = self.model.family, self.model.towers
        if self.device.type != "cpu":
            return family.encode(towers, items)
        return [encoded for item in items for encoded in self._encode_alone(item)]

    def _encode_alone(self, item: MediaInput) -> list[Encoded]:
        """What the towers make of one medium, with memory given back where that takes much."""
        family, towers = self.model.family, self.model.towers
        if sum(feature.nbytes for feature in item.features.values()) < LARGE_BYTES:
            return family.encode(towers, [item])
        give_back_freed()  # of preparing it
        encoded = family.encode(towers, [item])
        give_back_freed()
        return encoded

    def _native_step(
        self, step: list[Scheduled], native: NativeLayers, wants_logits: bool
    ) -> StackStep:
        """A step for a native stack, which knows no speakers and nothing that layers share."""
        angles, device = self.decoder.angles, self.device
        assert angles is not None
        token_ids = [token for s in step for token in s.token_ids]
        ends = _ends(step)
        generated = _generated_positions(step)
        until = embeds = None
        if not generated and any(_in_span(scheduled) for scheduled in step):
            until = _visible(step, device)[1].tolist()
            assert all(_unseen(scheduled, device) is None for scheduled in step)
        if not native.takes_ids or any(scheduled.sequence.encoded for scheduled in step):
            embeds = native.embed(token_ids)
        positions = generated or _step_positions(step)
        rope, rope_rows = native.turned(positions, angles, _long(step, ends, device))
        return StackStep(
            token_ids=token_ids,
            hidden=embeds,
            query_start=ends,
            num_keys=[s.end for s in step],
            block_tables=[s.sequence.block_table for s in step],
            rope=rope,
            rope_rows=rope_rows,
            logit_rows=_logit_rows(step, ends),
            visible_until=until,
            kept=None if self.kept is None else (self.kept.first, self.kept.last),
            adds={} if embeds is None else self._inject(step, embeds),
            wants_logits=wants_logits,
        )

    def _step(self, step: list[Scheduled]) -> Step:
        device = self.device
        token_ids = [t for s in step for t in s.token_ids]
        positions = _step_positions(step).to(device)
        ids = torch.tensor(token_ids, device=device)
        decoder = self.decoder
        embeds = embedded(decoder, step, ids) if speaks(step) else decoder.embed(ids)
        layer_adds = self._inject(step, embeds)
        ends = _ends(step)
        return Step(
            embeds=embeds,
            positions=positions,
            batch=self._batch(step, ends),
            logit_rows=torch.tensor(_logit_rows(step, ends), dtype=torch.long, device=device),
            layer_adds=layer_adds,
            expert_groups=_expert_groups(step, device),
            adapters=_adapters(step, ends, device),
            token_ids=ids,
            long=_long(step, ends, device),
            source=source_step(step, self.cache.block_size, embeds.shape[1], device),
        )

    def _inject(self, step: list[Scheduled], embeds: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Write media embeddings into embeds (tokens, hidden); collect what layers add."""
        adds: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        offset = 0
        for scheduled in step:
            sequence = scheduled.sequence
            for i, encoded in list(sequence.encoded.items()):
                if encoded.embeds is None:
                    continue
                indices = sequence.prompt.media[i].indices
                first, last = torch.searchsorted(
                    indices, torch.tensor([scheduled.start, scheduled.end])
                ).tolist()
                rows = (indices[first:last] - scheduled.start + offset).to(embeds.device)
                own = encoded.embeds[first:last].to(embeds.dtype)
                embeds[rows] = embeds[rows] + own if encoded.adds else own
                for layer, values in enumerate(encoded.layer_adds):
                    adds[layer].append((rows, values[first:last]))
                if last == len(indices):  # every token of it is computed: free the memory
                    del sequence.encoded[i]
            offset += scheduled.end - scheduled.start
        return {
            layer: (torch.cat([r for r, _ in parts]), torch.cat([v for _, v in parts]))
            for layer, parts in adds.items()
        }

    def _batch(self, step: list[Scheduled], ends: list[int]) -> AttentionBatch:
        layout = self.cache.layout
        device = self.device
        held = [s.sequence.block_table for s in step]
        slots = [
            sequence_slots(table, s.end, layout, device)
            for table, s in zip(held, step, strict=True)
        ]
        width = max(map(len, held))
        tables = [table + [HOLE] * (width - len(table)) for table in held]
        since = until = unseen = None
        if any(_in_span(scheduled) for scheduled in step):
            since, until = _visible(step, device)
            apart = [_unseen(scheduled, device) for scheduled in step]
            unseen = apart if any(each is not None for each in apart) else None
        return AttentionBatch(
            slot_mapping=torch.tensor(self._slot_mapping(step), device=device),
            query_start=ends,
            context_lens=[s.end for s in step],
            slots=[each.early for each in slots],
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            block_size=layout.size,
            visible_until=until,
            visible_from=since if self.decoder.config.spans_pass_windows else None,
            state_slots=self._state_slots(step),
            late_slots=[each.late for each in slots],
            kept=None if self.kept is None else (self.kept.first, self.kept.last),
            key_positions=[each.positions for each in slots],
            unseen=unseen,
        )

    def _slot_mapping(self, step: list[Scheduled]) -> list[int]:
        """The cache slot of each token."""
        slot = self.cache.layout.slot
        return [
            slot(scheduled.sequence.block_table, position)
            for scheduled in step
            for position in range(scheduled.start, scheduled.end)
        ]

    def _state_slots(self, step: list[Scheduled]) -> Tensor | None:
        """Each sequence's state slot, emptied if the sequence starts here; None without states."""
        if not self.decoder.config.has_states:
            return None
        self.cache.clear_states([s.sequence.state_slot for s in step if s.start == 0])
        return torch.tensor([s.sequence.state_slot for s in step], device=self.device)


def _ends(step: list[Scheduled]) -> list[int]:
    """Where each request's tokens begin among all, and where the last one's end."""
    return list(accumulate((s.end - s.start for s in step), initial=0))


def _logit_rows(step: list[Scheduled], ends: list[int]) -> list[int]:
    """The tokens whose logits are wanted: of those that sample, the last one and its drafts."""
    return [
        row
        for end, s in zip(ends[1:], step, strict=True)
        if s.samples
        for row in range(end - 1 - len(s.drafts), end)
    ]


def _expert_groups(step: list[Scheduled], device: torch.device) -> Tensor | None:
    """Which group of experts each token goes to: the prompt's own, 0 for generated tokens."""
    prompts = [scheduled.sequence.prompt for scheduled in step]
    if all(prompt.expert_groups is None for prompt in prompts):
        return None
    parts = []
    for scheduled, prompt in zip(step, prompts, strict=True):
        part = torch.zeros(scheduled.end - scheduled.start, dtype=torch.long)
        if prompt.expert_groups is not None:
            own = prompt.expert_groups[scheduled.start : scheduled.end]
            part[: len(own)] = own
        parts.append(part)
    return torch.cat(parts).to(device)


def _adapters(
    step: list[Scheduled], ends: list[int], device: torch.device
) -> dict[int, Tensor] | None:
    """The rows of the tokens that use each adapter; None where no request uses any."""
    rows: dict[int, list[int]] = defaultdict(list)
    for scheduled, start, end in zip(step, ends, ends[1:], strict=False):
        if scheduled.sequence.prompt.adapter is not None:
            rows[scheduled.sequence.prompt.adapter].extend(range(start, end))
    return {i: torch.tensor(own, device=device) for i, own in rows.items()} or None


def _long(step: list[Scheduled], ends: list[int], device: torch.device) -> Tensor | None:
    """Which tokens' sequences have outgrown the rope's short angles, (tokens, 1); None for none."""
    if not any(scheduled.sequence.long for scheduled in step):
        return None
    long = torch.zeros(ends[-1], 1, dtype=torch.bool)
    for scheduled, start, end in zip(step, ends, ends[1:], strict=False):
        long[start:end] = scheduled.sequence.long
    return long.to(device)


def _lacking(scheduled: Scheduled) -> list[int]:
    """The media that a step needs of a sequence and that are not encoded, by their number."""
    sequence = scheduled.sequence
    if scheduled.start >= sequence.num_prompt:
        return []
    return [
        i
        for i, item in enumerate(sequence.prompt.media)
        if i not in sequence.encoded and _is_needed(item, scheduled)
    ]


def _is_needed(item: MediaInput, scheduled: Scheduled) -> bool:
    """Whether a step must encode a medium: its first one if layers or an encoder read it, else its
    tokens'.
    """
    if item.source_tokens or scheduled.sequence.prompt.encoder_ids is not None:
        return scheduled.start == 0
    first, last = int(item.indices[0]), int(item.indices[-1])
    return first < scheduled.end and last >= scheduled.start


def _step_positions(step: list[Scheduled]) -> Tensor:
    """Rope positions of a step's tokens, (axes, tokens)."""
    counted = _generated_positions(step)
    if not counted:
        return torch.cat([_positions(scheduled) for scheduled in step], dim=1)
    axes = step[0].sequence.prompt.positions.shape[0]
    return torch.tensor(counted).expand(axes, -1)


def _generated_positions(step: list[Scheduled]) -> list[int]:
    """Rope positions of a step's tokens where all are generated, the same for every axis."""
    if any(scheduled.start < scheduled.sequence.num_prompt for scheduled in step):
        return []
    return [
        position + scheduled.sequence.prompt.next_position - scheduled.sequence.num_prompt
        for scheduled in step
        for position in range(scheduled.start, scheduled.end)
    ]


def _positions(scheduled: Scheduled) -> Tensor:
    """Rope positions (axes, tokens): the prompt's own, then counting on from its end."""
    prompt, sequence = scheduled.sequence.prompt, scheduled.sequence
    parts = []
    if scheduled.start < sequence.num_prompt:
        parts.append(prompt.positions[:, scheduled.start : min(scheduled.end, sequence.num_prompt)])
    if scheduled.end > sequence.num_prompt:
        shift = prompt.next_position - sequence.num_prompt
        first = max(scheduled.start, sequence.num_prompt)
        counted = torch.arange(first + shift, scheduled.end + shift)
        parts.append(counted.expand(prompt.positions.shape[0], -1))
    return torch.cat(parts, dim=1)


def _visible(step: list[Scheduled], device: torch.device) -> tuple[Tensor, Tensor]:
    """From which key position on each new token looks whatever the window, and how far: its span
    where it is in one that is seen in both directions.
    """
    parts = []
    for scheduled in step:
        start, end = scheduled.start, scheduled.end
        since = torch.arange(start, end)
        until = since + 1
        for first, last in scheduled.sequence.prompt.atomic_spans:
            low, high = max(first, start), min(last, end)
            if low < high:
                since[low - start : high - start] = first
                until[low - start : high - start] = last
        parts.append((since, until))
    since, until = (torch.cat(rows).to(device) for rows in zip(*parts, strict=True))
    return since, until


def _in_span(scheduled: Scheduled) -> bool:
    """Whether a step computes tokens of a span that is seen in both directions."""
    spans = scheduled.sequence.prompt.atomic_spans
    return any(first < scheduled.end and scheduled.start < last for first, last in spans)


def _unseen(scheduled: Scheduled, device: torch.device) -> Tensor | None:
    """Which later keys of its span each new token does not see, (tokens, keys); None for none."""
    ahead = scheduled.sequence.prompt.sees_ahead
    if ahead is None or not _in_span(scheduled):
        return None
    own, end = slice(scheduled.start, scheduled.end), scheduled.end
    both = torch.zeros(end, dtype=torch.bool)
    both[: len(ahead)] = ahead[:end]
    place = torch.arange(end)
    later = place > place[own, None]
    return (later & ~(both[own, None] & both)).to(device)
