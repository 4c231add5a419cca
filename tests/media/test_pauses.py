"""Where a long sound is cut: at pauses, nothing lost, no piece too long or too short."""

import numpy as np
import pytest

from opsin.media.pauses import SHORTEST, Piece, cut_at_pauses

RATE = 8000


def spoken(seconds, *pauses):
    """Noise with half a second of silence around each given moment."""
    samples = np.random.default_rng(0).normal(0, 0.1, int(seconds * RATE)).astype(np.float32)
    for moment in pauses:
        samples[int((moment - 0.25) * RATE) : int((moment + 0.25) * RATE)] = 0
    return samples


def test_cuts_stand_in_pauses():
    sound = spoken(70, 21.0, 44.0, 60.0)
    pieces = cut_at_pauses(sound, RATE, 30.0)
    assert [piece.end for piece in pieces[:-1]] == pytest.approx([21.0, 44.0], abs=0.05)
    assert pieces[-1].end == 70.0


@pytest.mark.parametrize("seconds", [0.01, 9.9, 10.0, 10.01, 10.3, 20.2, 31.0])
def test_nothing_is_lost_and_no_piece_is_out_of_bounds(seconds):
    sound = spoken(seconds)
    pieces = cut_at_pauses(sound, RATE, 10.0)
    assert np.array_equal(np.concatenate([piece.samples for piece in pieces]), sound)
    assert all(len(piece.samples) <= 10 * RATE for piece in pieces)
    assert len(pieces) == 1 or all(len(p.samples) >= SHORTEST * RATE for p in pieces)
    starts = [piece.start for piece in pieces]
    assert starts == [0.0, *(piece.end for piece in pieces[:-1])]


def test_silence_is_known():
    assert Piece(np.zeros(5, np.float32), 0, 1).is_silent
    assert not Piece(np.full(5, 0.01, np.float32), 0, 1).is_silent
    assert len(cut_at_pauses(np.zeros(25 * RATE, np.float32), RATE, 10.0)) == 3
