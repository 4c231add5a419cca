"""Runs requests through Opsin for the family tests, with the engine's inside in view."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import opsin
from opsin.decoder.cache import PagedCache
from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.runner import Runner
from opsin.engine.scheduler import Scheduled
from opsin.engine.sequence import Sequence as EngineSequence
from opsin.engine.source import encode_prompts
from opsin.families.base import Prompt
from opsin.types import Event, SamplingParams

from .checkpoints import Case
from .scenes import Scene

BLOCK = 8


class Ours:
    """A checkpoint folder as Opsin loads it."""

    def __init__(self, case: Case, folder: Path, **options: Any) -> None:
        self.case = case
        self.model, self.processor = opsin.load(folder, device="cpu", **options)
        self.prompts: dict[str, Prompt] = {}

    def prompt(self, scene: Scene) -> Prompt:
        """A scene as tokens and features; prepared once."""
        if scene.name not in self.prompts:
            self.prompts[scene.name] = self.prepare(scene)
        return self.prompts[scene.name]

    def prepare(self, scene: Scene) -> Prompt:
        """A scene as tokens and features."""
        pictures, sounds = iter(scene.images), iter(scene.audio)
        messages = [
            {**message, "content": [_filled(part, pictures, sounds) for part in message["content"]]}
            for message in scene.messages
        ]
        return self.processor.prepare(messages, options=self.case.processor_kwargs)

    @torch.inference_mode()
    def logits(self, prompt: Prompt, answer: Sequence[int] = ()) -> torch.Tensor:
        """Logits of prompt and answer in one pass.  # (tokens, vocab), fp32"""
        sequence = EngineSequence.start(0, prompt, SamplingParams())
        sequence.token_ids.extend(answer)
        sequence.lengthen(self.model.decoder.config.long_after)
        length = len(sequence.token_ids)
        blocks = -(-length // BLOCK)
        sequence.block_table = list(range(blocks))
        model = self.model
        sources = -(-sequence.num_source // BLOCK)
        sequence.source_table = list(range(sources))
        cache = PagedCache(
            model.decoder.config, blocks, BLOCK, model.dtype, model.device, 1, sources,
            by_head=model.decoder.native is not None,
        )  # fmt: skip
        sequence.speaker = model.family.speaker(prompt, model.towers)
        runner = Runner(model, cache)
        scheduled = [Scheduled(sequence, 0, length)]
        runner.encode_media(scheduled)
        encode_prompts(model, scheduled)
        step = dataclasses.replace(runner._step(scheduled), logit_rows=torch.arange(length))
        if sequence.speaker is None or not answer:
            return model.decoder(step, cache).float()
        speaker, first = sequence.speaker, len(prompt.token_ids) - 1
        stream = model.decoder.stream(step, cache)
        speaker.read(speaker.reads, stream[list(speaker.reads)])
        logits = model.decoder.logits(model.decoder.norm(stream))
        own = [
            speaker.scores(stream[i], logits[i], answer[: i - first]) for i in range(first, length)
        ]
        return torch.cat((torch.zeros(first, len(own[0])), torch.stack(own)))

    def engine(self, *, step: int = 2048, memory: int = 1 << 25) -> Engine:
        """An engine of its own over the model; close it."""
        limits = EngineLimits(prefill_step_size=step, memory=memory, block_size=BLOCK)
        return Engine(self.model, self.processor, limits)


def _filled(part: dict[str, Any], pictures: Any, sounds: Any) -> dict[str, Any]:
    if part["type"] == "image":
        return {"type": "image", "image": next(pictures)}
    if part["type"] == "audio":
        return {"type": "audio", "audio": next(sounds)}
    return part


def answers(
    engine: Engine, prompts: Sequence[Prompt], count: int = 64, **sampling: Any
) -> list[list[Event]]:
    """Every prompt's events; all are submitted before any is read."""
    parameters = SamplingParams(max_tokens=count, ignore_eos=True, **sampling)
    streams = [engine.stream(prompt, parameters) for prompt in prompts]
    return [list(stream) for stream in streams]


def tokens(events: Sequence[Event]) -> list[int]:
    """The tokens of an answer."""
    return [token for event in events for token in event.token_ids]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
