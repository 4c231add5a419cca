"""Sounds to the log-mel features that audio towers take, in the three manners in use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from opsin.errors import MediaError

MelScale = Literal["htk", "kaldi", "slaney"]
# Slaney's scale is linear up to here, 3 mels in 200 Hz, and logarithmic above.
_BREAK_HERTZ, _BREAK_MEL, _LOG_STEP = 1000.0, 15.0, math.log(6.4) / 27.0


def _mels(hertz: np.ndarray, scale: MelScale) -> np.ndarray:
    if scale == "htk":
        return 2595.0 * np.log10(1.0 + hertz / 700.0)
    if scale == "kaldi":
        return 1127.0 * np.log(1.0 + hertz / 700.0)
    above = np.log(np.maximum(hertz, _BREAK_HERTZ) / _BREAK_HERTZ) / _LOG_STEP
    return np.where(hertz < _BREAK_HERTZ, 3.0 * hertz / 200.0, _BREAK_MEL + above)


def _hertz(mels: np.ndarray, scale: MelScale) -> np.ndarray:
    if scale == "htk":
        return 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    if scale == "kaldi":
        return 700.0 * (np.exp(mels / 1127.0) - 1.0)
    above = _BREAK_HERTZ * np.exp(_LOG_STEP * (np.maximum(mels, _BREAK_MEL) - _BREAK_MEL))
    return np.where(mels < _BREAK_MEL, 200.0 * mels / 3.0, above)


@cache
def mel_filters(
    fft: int,
    filters: int,
    low: float,
    high: float,
    rate: int,
    scale: MelScale,
    *,
    equal_area: bool = False,
    in_mels: bool = False,
) -> np.ndarray:
    """Triangular filters from the bins of a Fourier transform: (fft / 2 + 1, filters), float64.

    Their centres lie at equal steps of the mel scale from `low` to `high` Hz. `equal_area` divides
    each by its width, `in_mels` draws the triangles' slopes over mels rather than Hz.
    """
    ends = _mels(np.array([low, high]), scale)
    centres = np.linspace(ends[0], ends[1], filters + 2)
    bins = np.arange(fft // 2 + 1) * (rate / fft)
    points = centres if in_mels else _hertz(centres, scale)
    places = _mels(bins, scale) if in_mels else bins
    widths = np.diff(points)
    distance = points[None, :] - places[:, None]  # (bins, filters + 2)
    rising, falling = -distance[:, :-2] / widths[:-1], distance[:, 2:] / widths[1:]
    weights = np.maximum(0.0, np.minimum(rising, falling))
    return weights * (2.0 / (points[2:] - points[:-2])) if equal_area else weights


def whisper_features(
    samples: np.ndarray, *, mels: int, rate: int = 16000, fft: int = 400, hop: int = 160
) -> Tensor:
    """Log-mel power as Whisper has it (arXiv:2212.04356): (mels, samples / hop), float32.

    samples (n,) float32. The values lie within 8 decades of the loudest, shifted and scaled to
    about -1 to 1.
    """
    wave = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
    window = torch.hann_window(fft)
    power = torch.stft(wave, fft, hop, window=window, return_complex=True)[:, :-1].abs() ** 2
    filters = mel_filters(fft, mels, 0.0, rate / 2, rate, "slaney", equal_area=True)
    spectrum = torch.from_numpy(filters).float().T @ power.contiguous()
    decades = spectrum.clamp(min=1e-10).log10()
    return (torch.maximum(decades, decades.max() - 8.0) + 4.0) / 4.0


def speech_features(
    samples: np.ndarray,
    *,
    mels: int,
    rate: int = 16000,
    fft: int = 512,
    length: int = 400,
    hop: int = 160,
    preemphasis: float = 0.97,
    high: float = 7690.0,
) -> Tensor:
    """Log-mel power over whole frames only, each with its own pre-emphasis: (frames, mels).

    samples (n,) float32, at least `length` of them. Sixteen-bit amplitudes are meant; power below
    one counts as one.
    """
    wave = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))
    frames = wave.unfold(0, length, hop)
    # The sample before a frame's first counts as equal to it.
    before = torch.cat((frames[:, :1], frames[:, :-1]), dim=1)
    frames = (frames - preemphasis * before) * 32768
    window = torch.hamming_window(length, periodic=False, dtype=torch.float64)
    power = torch.fft.rfft(window * frames, n=fft).to(torch.complex64).abs() ** 2
    filters = mel_filters(fft, mels, 0.0, high, rate, "kaldi", in_mels=True)
    return (power @ torch.from_numpy(filters).float()).clamp(min=1.0).log()


def too_short(least: str) -> MediaError:
    """The refusal of a sound that is shorter than one frame."""
    return MediaError(
        "The sound is too short",
        why=f"this model takes at least {least}",
        remedy="Send a longer one",
        param="audio",
    )


@dataclass(frozen=True, slots=True)
class UniversalMel:
    """The features of Universal Speech Models (arXiv:2303.01037) and their settings.

    `frame` and `hop` are samples. With `centred`, half a frame of silence goes before the sound and
    a frame counts if all of it is sound, else if its first sample is. The floor is added to the
    magnitudes before the logarithm, or is their least value (`least`).
    """

    mels: int = 128
    rate: int = 16000
    frame: int = 320
    hop: int = 160
    fft: int = 512
    low: float = 0.0
    high: float = 8000.0
    preemphasis: float = 0.0
    floor: float = 1e-3
    least: bool = False
    centred: bool = True
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def __call__(self, samples: np.ndarray, valid: int) -> tuple[Tensor, Tensor]:
        """samples (n,), of which the first `valid` are sound, the rest padding.

        Returns (frames, mels) float32, zero where a frame does not count, and (frames,) whether it
        does.
        """
        lead = self.frame // 2 if self.centred else 0
        wave = np.pad(np.asarray(samples), (lead, 0))
        if len(wave) <= self.frame:
            return torch.empty(0, self.mels), torch.empty(0, dtype=torch.bool)
        wide = np.lib.stride_tricks.sliding_window_view(wave, self.frame + 1)[:: self.hop]
        frames = wide[:, :-1]
        if self.preemphasis:
            first = wide[:, :1] * (1.0 - self.preemphasis)
            frames = np.concatenate((first, wide[:, 1:-1] - self.preemphasis * wide[:, :-2]), 1)
        angle = 2 * np.pi * np.arange(self.frame, dtype=np.float32) / self.frame
        window = (0.5 - 0.5 * np.cos(angle)).astype(np.float32)
        magnitude = np.abs(np.fft.rfft(frames * window, n=self.fft))
        filters = mel_filters(self.fft, self.mels, self.low, self.high, self.rate, "htk")
        mixed = magnitude @ filters
        values = np.log(np.maximum(mixed, self.floor) if self.least else mixed + self.floor)
        if self.mean:
            values = values - np.array(self.mean)
        if self.deviation:
            values = values / np.array(self.deviation)
        judged = np.arange(len(wide)) * self.hop + (self.frame if self.centred else 0)
        heard = (judged >= lead) & (judged < lead + valid)
        kept = values.astype(np.float32) * heard[:, None]
        return torch.from_numpy(kept), torch.from_numpy(heard)
