"""Rope angles that change when a sequence grows long: as the reference, which starts over then."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from .checkpoints import write_checkpoint
from .oracle import Reference
from .ours import Ours, answers, tokens
from .scenes import scenes
from .zoo import phi

SHORT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose short angles end within the answers."""
    pytest.importorskip("torchvision")
    config = {**phi.CASES[0].config, "original_max_position_embeddings": SHORT}
    case = dataclasses.replace(phi.CASES[0], variant="short", config=config)
    return write_checkpoint(case, tmp_path_factory.mktemp("short"))


def uncached(reference: Reference, inputs: dict[str, Any], count: int) -> list[int]:
    """The likeliest tokens, each from a whole pass: the reference's cache forgets the prompt when
    the angles change.
    """
    found: list[int] = []
    for _ in range(count):
        found.append(int(reference.logits(inputs)[-1].argmax()))
        ids = torch.cat((inputs["input_ids"], torch.tensor([found[-1:]])), dim=1)
        inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found


def test_a_sequence_that_grows_long_is_computed_again(folder: Path) -> None:
    case = phi.CASES[0]
    asked = {scene.name: scene for scene in scenes(case)}
    reference, ours = Reference(folder), Ours(case, folder)
    names = ("text", "sound", "one")
    lengths, expected = [], []
    for name in names:
        scene = asked[name]
        inputs = reference.inputs(scene.messages, scene.images, scene.audio)
        lengths.append(inputs["input_ids"].shape[1])
        expected.append(uncached(reference, inputs, 24))
    assert lengths[0] <= SHORT < lengths[0] + 24, "the first grows past the limit"
    assert lengths[2] > SHORT, "the last begins beyond it"
    prompts = [ours.prompt(asked[name]) for name in names]
    with ours.engine() as engine:
        together = answers(engine, prompts, count=24)
        (again,) = answers(engine, prompts[:1], count=24)
        engine.scheduler.check_integrity()
    assert [tokens(events) for events in together] == expected
    assert tokens(again) == expected[0]
