"""Cuts a long sound into pieces at its pauses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

HOP = 0.02  # seconds between two looks at the loudness
PAUSE = 0.3  # seconds over which a place must be quiet
SHORTEST = 0.5  # seconds of the last piece, so that no model finds it too short
SILENCE = 1e-4  # a piece that never exceeds this has nothing to hear


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a sound: float32 samples (samples,), and its first and last moment in seconds."""

    samples: np.ndarray
    start: float
    end: float

    @property
    def is_silent(self) -> bool:
        """Whether there is nothing to hear."""
        return len(self.samples) == 0 or float(abs(self.samples).max()) < SILENCE


def cut_at_pauses(samples: np.ndarray, rate: int, longest: float) -> list[Piece]:
    """The pieces of a sound (samples,), none longer than `longest` seconds, nothing left out.

    Each cut is made at the quietest moment in the second half of what one piece may hold.
    """
    limit = max(1, int(longest * rate))
    pieces = []
    start = 0
    while len(samples) - start > limit:
        last = min(start + limit, len(samples) - min(int(SHORTEST * rate), limit // 2))
        cut = _quietest(samples, start + limit // 2, last, rate)
        pieces.append(Piece(samples[start:cut], start / rate, cut / rate))
        start = cut
    pieces.append(Piece(samples[start:], start / rate, len(samples) / rate))
    return pieces


def _quietest(samples: np.ndarray, first: int, last: int, rate: int) -> int:
    """The middle of the quietest stretch between two places."""
    import numpy as np

    hop = max(1, int(HOP * rate))
    count = (last - first) // hop
    span = max(1, round(PAUSE / HOP))
    if count <= span:
        return last
    looked = samples[first : first + count * hop].reshape(count, hop).astype(np.float64)
    energy = (looked**2).mean(axis=1)
    smooth = np.convolve(energy, np.ones(span) / span, mode="valid")
    # Of equally quiet places the middle of the last run: pieces are as long as they may be.
    quiet = smooth <= smooth.min() + 1e-10
    end = len(quiet) - 1 - int(quiet[::-1].argmax())
    loud = np.flatnonzero(~quiet[:end])
    begin = int(loud[-1]) + 1 if len(loud) else 0
    return first + (begin + end + span) * hop // 2
