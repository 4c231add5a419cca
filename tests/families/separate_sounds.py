"""Lets a reference encode each of a request's sounds alone, as its authors' code does in effect."""

from __future__ import annotations

from typing import Any

import torch

# Transformers' port adds this encoder's padding mask to the scores as the number one, which masks
# nothing: of several sounds of different lengths, the shorter ones see the padding behind them. The
# authors' encoder masks it.
LEAKY = "Phi4MultimodalAudioModel"


def separate_sounds(model: torch.nn.Module) -> None:
    """Make the leaky encoder, if the model has it, take one sound at a time."""
    for module in model.modules():
        if type(module).__name__ == LEAKY:
            module.forward = _one_by_one(module.forward)  # type: ignore[method-assign]


def _one_by_one(forward: Any) -> Any:
    def each(features: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        if mask is None:
            return forward(features, None, **options)
        parts = [
            forward(sound[None, : int(seen.sum())], None, **options)[0]
            for sound, seen in zip(features, mask, strict=True)
        ]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    return each
