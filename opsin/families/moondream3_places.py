"""Moondream 3's detect and point: coordinates and sizes as tokens beyond the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opsin.families.base import Encoded
from opsin.towers.places import PlaceHead, share_of_bin

MOST = 150  # objects of one answer


@dataclass(frozen=True, slots=True)
class PlaceTokens:
    """Token ids that stand for places.

    First come the bins of a coordinate, then all pairs of bins of a width and a height.
    """

    first: int
    coordinates: int
    sizes: int

    @property
    def count(self) -> int:
        """How many there are."""
        return self.coordinates + self.sizes**2

    def size(self, wide: int, high: int) -> int:
        """The token of a size."""
        return self.first + self.coordinates + wide * self.sizes + high

    def is_size(self, token: int) -> bool:
        """Whether a token is a size."""
        return token >= self.first + self.coordinates

    def coordinate_of(self, token: int) -> float:
        """A coordinate's share of the picture's side."""
        return (token - self.first) / self.coordinates

    def size_of(self, token: int) -> tuple[float, float]:
        """A size's shares of the picture's sides."""
        wide, high = divmod(token - self.first - self.coordinates, self.sizes)
        return share_of_bin(wide), share_of_bin(high)

    def objects(self, tokens: Sequence[int], *, boxes: bool) -> list[dict[str, float]]:
        """The places that an answer's tokens name, whole ones only."""
        step = 3 if boxes else 2
        own = [token for token in tokens if token >= self.first]
        return [self._object(own[i : i + step]) for i in range(0, len(own) - step + 1, step)]

    def _object(self, tokens: Sequence[int]) -> dict[str, float]:
        x, y = self.coordinate_of(tokens[0]), self.coordinate_of(tokens[1])
        if len(tokens) == 2:
            return {"x": x, "y": y}
        wide, high = self.size_of(tokens[2])
        return {
            "x_min": x - wide / 2,
            "y_min": y - high / 2,
            "x_max": x + wide / 2,
            "y_max": y + high / 2,
        }

    def written(self, tokens: Sequence[int]) -> str:
        """The answer that tokens are, as JSON."""
        boxes = any(map(self.is_size, tokens))
        found = self.objects(tokens, boxes=boxes)
        return json.dumps({"objects" if boxes else "points": found})


class PlaceSpeaker:
    """One request's answer: x, y and (for boxes) a size, again and again until the end token."""

    exclusive = True
    reads: Sequence[int] = ()

    def __init__(
        self,
        head: PlaceHead,
        tokens: PlaceTokens,
        end: int,
        *,
        boxes: bool,
    ) -> None:
        self.head, self.tokens, self.end, self.boxes = head, tokens, end, boxes
        self.step = 3 if boxes else 2
        self.pending: list[int] = []
        self.num_said = 0

    def see(self, index: int, encoded: Encoded) -> None:
        """The picture is in the stream."""

    def read(self, places: Sequence[int], stream: Tensor) -> None:
        """Nothing of the prompt is read."""

    def scores(self, stream: Tensor, logits: Tensor, said: Sequence[int]) -> Tensor:
        """All but what comes next at minus infinity; it ends where the end is the likeliest."""
        tokens, phase = self.tokens, len(said) % self.step
        scores = torch.full((tokens.first + tokens.count,), -torch.inf, device=logits.device)
        over = self.end in said[-1:] or len(said) >= MOST * self.step
        if phase == 0 and (over or int(logits.argmax()) == self.end):
            scores[self.end] = 0.0
            return scores
        if phase == 2:
            scores[tokens.size(*self.head.size(stream))] = 0.0
        else:
            scores[tokens.first + self.head.coordinate(stream)] = 0.0
        return scores

    def embeds(self, token_ids: Tensor, before: Sequence[int]) -> Tensor:
        """Coordinates and sizes as the head writes them into the stream."""
        del before
        own = token_ids - self.tokens.first
        pairs = (own - self.tokens.coordinates).clamp(min=0)
        bins = torch.stack((pairs // self.tokens.sizes, pairs % self.tokens.sizes), dim=1)
        is_size = (own >= self.tokens.coordinates)[:, None]
        coordinates = self.head.embed_coordinates(own.clamp(max=self.tokens.coordinates - 1))
        return torch.where(is_size, self.head.embed_sizes(bins), coordinates)

    def say(self, token: int) -> str | None:
        """An object once it is whole."""
        if token < self.tokens.first:
            return ""
        self.pending.append(token)
        if len(self.pending) < self.step:
            return ""
        (found,) = self.tokens.objects(self.pending, boxes=self.boxes)
        self.pending.clear()
        before = ", " if self.num_said else self._opening
        self.num_said += 1
        return before + json.dumps(found)

    def close(self) -> str:
        """The end of the list."""
        return "]}" if self.num_said else self._opening + "]}"

    @property
    def _opening(self) -> str:
        return '{"objects": [' if self.boxes else '{"points": ['
