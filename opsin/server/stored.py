"""Responses kept for `previous_response_id`: bounded in number and bytes, apart for each key."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opsin.errors import NotFoundError

MAX_BYTES = 64 << 20  # for each key


@dataclass(frozen=True, slots=True)
class Stored:
    """One response, the items of its whole conversation, and how many of them were its input."""

    response: dict[str, Any]
    items: tuple[Any, ...]
    first: int
    last: int
    size: int


class ResponseStore:
    """The responses of every key; the oldest of a key make room for its newest."""

    def __init__(self, max_stored: int, max_bytes: int = MAX_BYTES) -> None:
        self.max_stored = max_stored
        self.max_bytes = max_bytes
        self._held: dict[str, OrderedDict[str, Stored]] = {}
        self._sizes: dict[str, int] = {}

    def get(self, key: str, response_id: str) -> Stored:
        """A response of this key; one of another key is not found."""
        found = self._held.get(key, OrderedDict()).get(response_id)
        if found is None:
            raise NotFoundError(
                f"Response {response_id[:80]} was not found",
                why="it was never stored, was deleted, or made room for newer ones",
                param="previous_response_id",
            )
        return found

    def put(
        self,
        key: str,
        response: dict[str, Any],
        before: Sequence[Any],
        given: Sequence[Any],
        output: Sequence[Any],
    ) -> None:
        """Keep a response: the items before it, those given with it, and its own."""
        items = (*before, *given, *output)
        size = len(json.dumps([response, items]))
        if size > self.max_bytes or self.max_stored == 0:
            return
        held = self._held.setdefault(key, OrderedDict())
        last = len(before) + len(given)
        held[response["id"]] = Stored(response, items, len(before), last, size)
        self._sizes[key] = self._sizes.get(key, 0) + size
        while len(held) > self.max_stored or self._sizes[key] > self.max_bytes:
            self._sizes[key] -= held.popitem(last=False)[1].size

    def delete(self, key: str, response_id: str) -> None:
        """Forget a response of this key."""
        found = self.get(key, response_id)
        del self._held[key][response_id]
        self._sizes[key] -= found.size
