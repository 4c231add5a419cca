"""Lets a reference encode each of a request's sounds alone, as its authors' code does in effect."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

# Transformers' port adds this encoder's padding mask to the scores as the number one, which masks
# nothing: of several sounds of different lengths, the shorter ones see the padding behind them. The
# authors' encoder masks it.
LEAKY = "Phi4MultimodalAudioModel"

# The convolutions of this encoder look ahead, and its features count frames of which only the
# beginning is sound: of several sounds, the shorter ones get frames that they lack alone.
LOOKING_AHEAD = "Gemma3nAudioEncoder"
FRAMES_BEYOND = "Gemma3nAudioFeatureExtractor"


def separate_sounds(model: torch.nn.Module) -> None:
    """Make an encoder in which sounds meet, if the model has one, take one sound at a time."""
    for module in model.modules():
        if type(module).__name__ == LEAKY:
            module.forward = _one_by_one(module.forward)  # type: ignore[method-assign]
        if type(module).__name__ == LOOKING_AHEAD:
            module.forward = _trimmed(module.forward)  # type: ignore[method-assign]


def separate_features(extractor: Any) -> Any:
    """The feature extractor, which pads several sounds' features rather than the sounds."""
    kind = type(extractor)
    if kind.__name__ != FRAMES_BEYOND:
        return extractor

    def each(self: Any, raw_speech: Any, **options: Any) -> Any:
        sounds = raw_speech if isinstance(raw_speech, list | tuple) else [raw_speech]
        found = [
            kind.__call__(self, sound, **{**options, "return_tensors": "pt"}) for sound in sounds
        ]
        for name in found[0]:
            found[0][name] = pad_sequence([one[name][0] for one in found], batch_first=True)
        return found[0]

    extractor.__class__ = type(kind.__name__, (kind,), {"__call__": each})
    return extractor


def _one_by_one(forward: Any) -> Any:
    def each(features: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        if mask is None:
            return forward(features, None, **options)
        parts = [
            forward(sound[None, : int(seen.sum())], None, **options)[0]
            for sound, seen in zip(features, mask, strict=True)
        ]
        return pad_sequence(parts, batch_first=True)

    return each


def _trimmed(forward: Any) -> Any:
    def each(features: torch.Tensor, beyond: torch.Tensor, **options: Any) -> Any:
        counts = (~beyond).sum(1).tolist()
        parts = [
            forward(sound[None, :count], mask[None, :count], **options)
            for sound, mask, count in zip(features, beyond, counts, strict=True)
        ]
        states = [part.last_hidden_state[0] for part in parts]
        masks = [part.audio_mel_mask[0] for part in parts]
        parts[0].last_hidden_state = pad_sequence(states, batch_first=True)
        parts[0].audio_mel_mask = pad_sequence(masks, batch_first=True, padding_value=True)
        return parts[0]

    return each
