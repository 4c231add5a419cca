"""What every engine of bench/cpu.py measures, and how it is asked: standard library only.

An engine is a process that answers one JSON line for each name of a row on its standard input, so
that engines stay loaded side by side and are asked in turn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

SHORT = 20  # tokens of a short prompt
NEW_TOKENS = 32  # generated after a short prompt
STREAMS, STREAM_TOKENS = 8, 12  # sequences at once, and what each generates
PREFILL = 512  # tokens of a long prompt
AFTER_PICTURE = 32  # generated after a picture
PICTURES = 4  # of one request
FIRST_ID = 300  # of the text tokens

CLOCK = "BENCH_CLOCK"  # environment: "cpu" counts processor seconds of the whole process

Figures = dict[str, float]


def now() -> float:
    """Seconds, of the wall or of this process's work."""
    return time.process_time() if os.environ.get(CLOCK) == "cpu" else time.perf_counter()


def text_ids(count: int, start: int = 0) -> list[int]:
    """Some text tokens; other ones for another start."""
    return [FIRST_ID + (start * 131 + 7 * i) % 4000 for i in range(count)]


def rate(times: Sequence[float]) -> float:
    """Tokens a second from the moments at which they came, the first one not counted."""
    return (len(times) - 1) / max(times[-1] - times[0], 1e-9)


def streams_rate(times: Iterable[Sequence[float]]) -> float:
    """Tokens a second of several sequences, from when each of them has its first one on."""
    all_times = list(times)
    begin = max(own[0] for own in all_times)
    later = [moment for own in all_times for moment in own if moment > begin]
    return len(later) / max(max(later) - begin, 1e-9)


def peak_memory_gb() -> float:
    """The most memory that this process has had, mapped files included."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def answer(rows: dict[str, Callable[[], Figures]], load_seconds: float) -> None:
    """Serve the rows until standard input ends; the first line sent is what loading took."""
    print(json.dumps({"load_s": load_seconds}), flush=True)
    for line in sys.stdin:
        figures = rows[line.strip()]() | {"peak_memory_gb": peak_memory_gb()}
        print(json.dumps(figures), flush=True)


def since(start: float) -> float:
    """Seconds since `start`, which `now` gave."""
    return now() - start
