"""Packs on the device: fresh ones as they come, used again where the workers are behind."""

from __future__ import annotations

import queue
import random
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from training.bundled.forward import Batch
from training.bundled.packing import Arrays, Factory

KEPT = 1200  # packs held for another use
SETTLED = 200  # packs that must be there before any is used again


@dataclass
class Held:
    """One pack on the device."""

    fields: dict[str, Tensor]
    longest_image: int
    longest_text: int
    uses: int = 0


def hold(arrays: Arrays, device: torch.device) -> Held:
    """Copies a pack to the device; the arrays may be overwritten afterwards."""
    fields = {}
    for key, array in arrays.items():
        tensor = torch.from_numpy(array)
        fields[key] = tensor.to(device) if device.type == "cuda" else tensor.clone()
    counts = arrays["images"][:, 4] * arrays["images"][:, 5]
    return Held(fields, int(counts.max()), int(arrays["lengths"].max()))


def _edges(lengths: Tensor) -> Tensor:
    edges = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    edges[1:] = lengths.cumsum(0)
    return edges


def join(packs: list[Held]) -> Batch:
    """Packs end to end, their offsets moved along."""
    images, patches = [], []
    pixel_base, image_base = 0, 0
    for part in packs:
        shifted = part.fields["images"].clone()
        shifted[:, :3] += pixel_base
        images.append(shifted)
        moved = part.fields["patches"].clone()
        moved[0] += image_base
        patches.append(moved)
        pixel_base += len(part.fields["pixels"])
        image_base += len(shifted)

    def both(key: str) -> Tensor:
        return torch.cat([part.fields[key] for part in packs], dim=-1)

    def rows(key: str) -> Tensor:
        return torch.cat([part.fields[key] for part in packs])

    every = torch.cat(images)
    return Batch(
        pixels=both("pixels"),
        images=every,
        tables=rows("tables"),
        cells=rows("cells"),
        patches=torch.cat(patches, dim=1),
        ids=both("ids").long(),
        labels=both("labels").long(),
        weights=both("weights"),
        positions=both("positions"),
        image_spans=(_edges(every[:, 4] * every[:, 5]), max(part.longest_image for part in packs)),
        text_spans=(_edges(both("lengths")), max(part.longest_text for part in packs)),
    )


class Feed:
    """A thread that copies packs to the device, and the choice between fresh and used packs."""

    def __init__(self, factory: Factory, device: torch.device, replays: int) -> None:
        self.factory = factory
        self.device = device
        self.replays = replays
        self.fresh = 0
        self._ready: queue.Queue[Held] = queue.Queue(maxsize=32)
        self._held: list[Held] = []
        self._random = random.Random(0)
        self._open = True
        self._main = torch.cuda.current_stream() if device.type == "cuda" else None
        self._thread = threading.Thread(target=self._fill, daemon=True)
        self._thread.start()

    def _fill(self) -> None:
        side = torch.cuda.Stream() if self._main is not None else None
        while self._open:
            slot, arrays = self.factory.take()
            if side is None or self._main is None:
                held = hold(arrays, self.device)
            else:
                with torch.cuda.stream(side):
                    held = hold(arrays, self.device)
                side.synchronize()
                for tensor in held.fields.values():
                    tensor.record_stream(self._main)
            self.factory.give(slot)
            while self._open:
                try:
                    self._ready.put(held, timeout=1)
                    break
                except queue.Full:
                    continue

    def _again(self) -> Held:
        index = self._random.randrange(len(self._held))
        held = self._held[index]
        held.uses += 1
        if held.uses >= self.replays:
            self._held[index] = self._held[-1]
            self._held.pop()
        return held

    def take(self, count: int) -> list[Held]:
        """count packs: fresh where there are any, else used ones, else it waits."""
        taken = []
        for _ in range(count):
            try:
                held = self._ready.get_nowait()
            except queue.Empty:
                if self.replays and len(self._held) > SETTLED:
                    taken.append(self._again())
                    continue
                held = self._ready.get()
            self.fresh += 1
            taken.append(held)
            if self.replays:
                if len(self._held) >= KEPT:
                    self._held.pop(self._random.randrange(len(self._held)))
                self._held.append(held)
        return taken

    def close(self) -> None:
        """Ends the thread and the workers."""
        self._open = False
        self.factory.close()
