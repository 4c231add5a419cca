"""The points of MolmoPoint: tokens beyond the vocabulary, one for each patch of the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsin.families.base import Encoded
from opsin.towers.pointing import PLACES, PointHead

NEVER = -100000.0  # of words that stand for points, and of points that cannot be


@dataclass(frozen=True, slots=True)
class PointWords:
    """The words that points are chosen and embedded by, and what the config asks of their order."""

    first: int  # the first token beyond the vocabulary
    patch: int
    part: int
    place: int
    sorted_patches: bool
    sorted_parts: bool
    once: bool


class PointSpeaker:
    """One request's points: a patch, a part of it, a place in the part, again and again."""

    exclusive = False

    def __init__(
        self,
        head: PointHead,
        words: PointWords,
        rows: Tensor,
        places: Tensor,
        indexable: Tensor,
        pooling: Sequence[Tensor],
    ) -> None:
        """rows (2, hidden) embed a patch's word and a place's; places (patches,) are where patches
        of all pictures stand in the prompt, those that can be named are `indexable`; each picture's
        pooling (patches, parts) is negative where a patch has no such part.
        """
        self.head, self.words, self.rows = head, words, rows
        device = rows.device
        self.reads: Sequence[int] = places.tolist()
        self.row_of = {place: row for row, place in enumerate(self.reads)}
        self.order = (indexable.long().cumsum(0) - 1).to(device)
        self.open_to = torch.cat((indexable, torch.ones(1, dtype=torch.bool))).to(device)
        self.missing = (torch.cat(tuple(pooling)) < 0).to(device)
        patches, parts = self.missing.shape
        self.seen: list[Encoded | None] = [None] * len(pooling)
        self.no_more = words.first + patches
        self.parts_from = self.no_more + 1
        self.places_from = self.parts_from + parts
        self.keys = torch.empty(patches + 1, head.dim, device=device, dtype=rows.dtype)
        self.added = self.parts = torch.empty(0)

    def see(self, index: int, encoded: Encoded) -> None:
        """Patches' embeddings, and their parts' features."""
        self.seen[index] = encoded
        found = [each for each in self.seen if each is not None]
        if len(found) == len(self.seen):
            self.added = torch.cat([each.embeds for each in found if each.embeds is not None])
            self.parts = torch.cat([each.kept[0] for each in found])

    def read(self, places: Sequence[int], stream: Tensor) -> None:
        """Keys of the prompt's patches."""
        rows = torch.tensor([self.row_of[place] for place in places], device=stream.device)
        keys = self.head.patch_keys(stream, self.order[rows])
        self.keys[rows], self.keys[-1] = keys[:-1], keys[-1]

    def scores(self, stream: Tensor, logits: Tensor, said: Sequence[int]) -> Tensor:
        """The words' logits and the points'; a patch has the logit of the word for one."""
        words, scores = self.words, torch.full((self.places_from + PLACES,), NEVER)
        scores = scores.to(logits.device)
        scores[: words.first] = logits
        point = logits[words.patch].clone()
        scores[[words.patch, words.part, words.place]] = NEVER
        if said:
            last = said[-1]
            before = [token - words.first for token in said[:-1] if self._is_patch(token)]
            place = self.order[before[-1]].clamp(min=0) if before else self.order.new_zeros(())
            found = self.head.patch_scores(stream, self.keys, place)
            scores[words.first + int(found.masked_fill(~self.open_to, -torch.inf).argmax())] = point
            if self._is_patch(last):
                patch = last - words.first
                parts = self.head.part_scores(stream, self.parts[patch])
                parts = parts.masked_fill(self.missing[patch], NEVER)
                scores[self.parts_from : self.places_from] = parts
            elif self.parts_from <= last < self.places_from:
                scores[self.places_from :] = self.head.place_scores(stream)
        return self._ordered(scores, said)

    def _is_patch(self, token: int) -> bool:
        return self.words.first <= token < self.no_more

    def _ordered(self, scores: Tensor, said: Sequence[int]) -> Tensor:
        """Scores with what the order of points forbids at minus infinity."""
        words, first = self.words, self.words.first
        last = said[-1] if said else -1
        # The authors do not count the last two tokens among those that came before.
        patches = [token for token in said[:-2] if first <= token < self.parts_from]
        parts = [token for token in said[:-2] if self.parts_from <= token < self.places_from]
        barred = -torch.inf
        if self.no_more in said:
            scores[first:] = barred
        elif last < first or last >= self.places_from:
            scores[self.parts_from :] = barred
            if words.sorted_patches and patches:
                scores[first : patches[-1]] = barred
            if words.once and words.sorted_parts and parts and parts[-1] == self.places_from - 1:
                scores[patches[-1]] = barred
        elif last < self.parts_from:
            scores[: self.parts_from] = barred
            scores[self.places_from :] = barred
            if words.sorted_parts and patches and patches[-1] == last:
                scores[self.parts_from : parts[-1] + int(words.once)] = barred
        else:
            scores[: self.places_from] = barred
        return scores

    def embeds(self, token_ids: Tensor, before: Sequence[int]) -> Tensor:
        """A patch as in the prompt, a part by its features, a place by its word."""
        rows = []
        for token, previous in zip(token_ids.tolist(), before, strict=True):
            if self._is_patch(token):
                rows.append(self.rows[0] + self.added[token - self.words.first].to(self.rows))
            elif token == self.no_more:
                rows.append(self.rows[0])
            elif token < self.places_from:
                part = self.parts[previous - self.words.first, token - self.parts_from]
                rows.append(self.head.part_in(part[None].to(self.rows))[0])
            else:
                rows.append(self.rows[1])
        return torch.stack(rows)

    def say(self, token: int) -> str | None:
        """A point's token by its number."""
        number = token - self.words.first
        return f"<POINT_{number}>" if number >= 0 else None

    def close(self) -> str:
        """Nothing: points stand within the text."""
        return ""
