"""The reference of a family that Transformers lacks: a module of `tests/oracles`, run plainly."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from .oracle import read_json


def oracle_module(name: str) -> Any:
    """The module of `tests/oracles`; see its package for what it holds."""
    return importlib.import_module(f"tests.oracles.{name}")


@dataclass
class PortedReference:
    """A checkpoint folder as an oracle reads it."""

    folder: Path
    oracle: str

    @cached_property
    def model(self) -> nn.Module:
        """The model in fp32, every weight found and every weight used."""
        model: nn.Module = oracle_module(self.oracle).build(read_json(self.folder, "config.json"))
        model.load_state_dict(load_file(self.folder / "model.safetensors"), strict=True)
        return model.eval()

    def inputs(
        self,
        messages: Sequence[dict[str, Any]],
        images: Sequence[Image.Image] = (),
        audio: Sequence[Any] = (),
        processor_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Token ids, pixels and the rest, with a leading axis of one request."""
        encode = oracle_module(self.oracle).encode
        inputs: dict[str, Any] = encode(
            self.folder, messages, list(images), list(audio), dict(processor_kwargs or {})
        )
        return inputs

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Logits of the whole sequence.  # (tokens, vocab), fp32"""
        logits: torch.Tensor = self.model(inputs)
        return logits.float()

    @torch.no_grad()
    def greedy(self, inputs: dict[str, Any], count: int = 64) -> list[int]:
        """The next `count` tokens, the likeliest each time, each from a pass over everything.

        A model that says more than its vocabulary has a `next_token(inputs, prompt tokens)`.
        """
        ids = inputs["input_ids"]
        prompt = ids.shape[1]
        own = getattr(self.model, "next_token", None)
        for _ in range(count):
            sequence = {**inputs, "input_ids": ids}
            following = self.model(sequence)[-1].argmax() if own is None else own(sequence, prompt)
            ids = torch.cat((ids, torch.as_tensor(following).view(1, 1)), dim=1)
        return ids[0, prompt:].tolist()
