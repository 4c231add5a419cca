"""Whether the engines live: their threads run, and with work to do they take steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

from opsin.server.manager import Loaded, Manager

# A step over a long prompt on a slow machine takes seconds; minutes mean that it hangs.
STALL_SECONDS = 120.0


@dataclass(slots=True)
class Pulse:
    """An engine's step count and since when it has stood there with work to do."""

    steps: int
    since: float


class Heart:
    """Watches the engines from one question to the next."""

    def __init__(self, manager: Manager, stall_seconds: float = STALL_SECONDS) -> None:
        self.manager = manager
        self.stall_seconds = stall_seconds
        self._pulses: dict[int, Pulse] = {}

    def ailing(self) -> str | None:
        """What is wrong, None if nothing is."""
        known = {id(model) for model in self.manager.loaded}
        self._pulses = {key: pulse for key, pulse in self._pulses.items() if key in known}
        found = (self._ailment(model) for model in self.manager.loaded)
        return next((text for text in found if text is not None), None)

    def _ailment(self, model: Loaded) -> str | None:
        if not model.engine.alive:
            return f"the engine of {model.name} has ended"
        stats, now = model.engine.stats(), time.monotonic()
        pulse = self._pulses.setdefault(id(model), Pulse(stats["steps"], now))
        idle = not stats["running"] and not stats["waiting"]
        if idle or stats["steps"] != pulse.steps:
            pulse.steps, pulse.since = stats["steps"], now
        if now - pulse.since > self.stall_seconds:
            return f"the engine of {model.name} has taken no step for {now - pulse.since:.0f} s"
        return None
