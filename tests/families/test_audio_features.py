"""Log-mel features against the extractors that the models were published with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from opsin.towers.mel import UniversalMel, speech_features, whisper_features

from .pictures import sound

TOLERANCE = 1e-4
SECONDS = (0.5, 1.3, 3.017)


def quiet_start(seconds: float) -> np.ndarray:
    """A sound with a stretch of perfect silence before it."""
    samples = sound(31, seconds).astype(np.float32)
    samples[: len(samples) // 5] = 0.0
    return samples


def error(ours: torch.Tensor, theirs: object) -> float:
    """The largest difference."""
    return float((ours - torch.as_tensor(theirs)).abs().max())


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("mels", [80, 128])
def test_whisper_s_features(seconds: float, mels: int) -> None:
    samples = quiet_start(seconds)
    extractor = transformers.WhisperFeatureExtractor(feature_size=mels)
    theirs = extractor(samples, sampling_rate=16000, padding=False)["input_features"][0]
    assert error(whisper_features(samples, mels=mels), theirs) < TOLERANCE


@pytest.mark.parametrize("seconds", SECONDS)
def test_speech_features(seconds: float) -> None:
    samples = quiet_start(seconds)
    extractor = transformers.Phi4MultimodalFeatureExtractor()
    theirs = extractor(samples, sampling_rate=16000)["audio_input_features"][0]
    ours = speech_features(samples, mels=80)
    assert ours.shape == theirs.shape
    assert error(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("earlier", [False, True], ids=["fourth", "third"])
def test_universal_speech_features(seconds: float, earlier: bool) -> None:
    samples = quiet_start(seconds)
    padded = np.pad(samples, (0, -len(samples) % 128))
    settings = UniversalMel()
    extractor = transformers.Gemma4AudioFeatureExtractor()
    if earlier:
        extractor = transformers.Gemma3nAudioFeatureExtractor()
        settings = UniversalMel(
            frame=512,
            fft=1024,
            low=125.0,
            high=7600.0,
            preemphasis=0.97,
            floor=1e-5,
            least=True,
            centred=False,
        )
    theirs = extractor([samples], return_tensors="pt")
    ours, whole = settings(padded, len(samples))
    mask = theirs["input_features_mask"][0]
    assert whole.tolist() == mask.tolist()
    assert error(ours[whole], theirs["input_features"][0][mask]) < TOLERANCE
