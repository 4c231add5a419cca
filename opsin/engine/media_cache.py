"""What towers made of media, kept so that the same picture asked again is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from opsin.families.base import Encoded, MediaInput


class EncodedCache:
    """Encoded media by content key, the least recently used going first; bounded in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._entries: OrderedDict[tuple[str, bytes], Encoded] = OrderedDict()

    def encode(
        self,
        items: Sequence[MediaInput],
        run: Callable[[Sequence[MediaInput]], list[Encoded]],
    ) -> list[Encoded]:
        """Each item's encoding, in order; `run` is called once for those not known, each once."""
        found: dict[tuple[str, bytes], Encoded] = {}
        new: dict[tuple[str, bytes], MediaInput] = {}
        for number, item in enumerate(items):
            entry = _entry(item, number)
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
        return [found[_entry(item, number)] for number, item in enumerate(items)]

    def _keep(self, entry: tuple[str, bytes], encoded: Encoded) -> None:
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


def _entry(item: MediaInput, number: int) -> tuple[str, bytes]:
    """What identifies an item: its content, or, for one without a key, its place in the call."""
    return (item.kind, item.key) if item.key else (f"{item.kind} {number}", b"")
