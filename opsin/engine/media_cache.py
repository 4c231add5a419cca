"""What towers made of media, kept so that the same picture asked again is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeAlias

from opsin.families.base import Encoded, MediaInput

# kind, salt, content key
Entry: TypeAlias = tuple[str, bytes, bytes]


class EncodedCache:
    """Encoded media by salt and content key, the least recently used first to go; bounded in bytes.

    Requests with different salts share nothing: how long an answer takes tells one nothing of what
    another has asked.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[Entry, Encoded] = OrderedDict()

    def encode(
        self,
        items: Sequence[MediaInput],
        salts: Sequence[bytes],
        run: Callable[[Sequence[MediaInput]], list[Encoded]],
    ) -> list[Encoded]:
        """Each item's encoding, in order; `run` is called once for those not known, each once."""
        found: dict[Entry, Encoded] = {}
        new: dict[Entry, MediaInput] = {}
        entries = [_entry(item, salts[i], i) for i, item in enumerate(items)]
        for entry, item in zip(entries, items, strict=True):
            if entry in self._entries:
                self._entries.move_to_end(entry)
                found[entry] = self._entries[entry]
                self.hits += 1
            else:
                new.setdefault(entry, item)
        if new:
            self.misses += len(new)
            found |= zip(new, run(list(new.values())), strict=True)
            for entry, item in new.items():
                if item.key:
                    self._keep(entry, found[entry])
        return [found[entry] for entry in entries]

    def _keep(self, entry: Entry, encoded: Encoded) -> None:
        size = encoded.num_bytes
        if size > self.max_bytes:
            return
        self._entries[entry] = encoded
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.num_bytes = 0


def _entry(item: MediaInput, salt: bytes, number: int) -> Entry:
    """What identifies an item: its content, or, for one without a key, its place in the call."""
    return (item.kind, salt, item.key) if item.key else (f"{item.kind} {number}", salt, b"")
