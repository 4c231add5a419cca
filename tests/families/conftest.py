"""Checkpoints, references and loaded models, each built once and only when a test asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from .checkpoints import Case, write_checkpoint
from .oracle import Reference
from .ours import Ours
from .ported_reference import PortedReference
from .scenes import Scene, scenes


@dataclass
class Lab:
    """One case: its folder, the reference's answers to its scenes, and our model."""

    case: Case
    folder: Path
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    greedy: dict[str, list[int]] = field(default_factory=dict)
    merged: dict[str, Reference] = field(default_factory=dict)

    @cached_property
    def reference(self) -> Reference | PortedReference:
        """The folder as Transformers loads it, or the oracle of a family that it lacks."""
        if self.case.oracle:
            return PortedReference(self.folder, self.case.oracle)
        return Reference(self.folder, self.case.encode)

    @cached_property
    def published(self) -> Path:
        """The folder that Opsin reads: the same, or its authors' form of it."""
        if self.case.publish is None:
            return self.folder
        target = self.folder / "published"
        self.case.publish(self.folder, target)
        return target

    def reference_for(self, scene: Scene) -> Reference | PortedReference:
        """The reference with the adapter that the scene's media call for."""
        adapter = "vision" if scene.images else "speech" if scene.audio else None
        if self.case.merge is None or adapter is None:
            return self.reference
        if adapter not in self.merged:
            target = self.folder / adapter
            self.case.merge(self.folder, adapter, target)
            self.merged[adapter] = Reference(target, self.case.encode)
        return self.merged[adapter]

    @cached_property
    def ours(self) -> Ours:
        """The folder as Opsin loads it."""
        return Ours(self.case, self.published)

    @cached_property
    def scenes(self) -> dict[str, Scene]:
        """What the case is asked."""
        return {scene.name: scene for scene in scenes(self.case)}

    def encode(self, scene: Scene) -> dict[str, Any]:
        """A scene as the reference's processor makes it."""
        return self.reference.inputs(
            scene.messages, scene.images, scene.audio, self.case.processor_kwargs
        )

    def reference_inputs(self, name: str) -> dict[str, Any]:
        """A scene's inputs, made once."""
        if name not in self.inputs:
            self.inputs[name] = self.encode(self.scenes[name])
        return self.inputs[name]

    def reference_logits(self, name: str) -> torch.Tensor:
        """The reference's logits of a whole scene.  # (tokens, vocab)"""
        if name not in self.logits:
            reference = self.reference_for(self.scenes[name])
            self.logits[name] = reference.logits(self.reference_inputs(name))
        return self.logits[name]

    def reference_greedy(self, name: str) -> list[int]:
        """The reference's next 64 tokens."""
        if name not in self.greedy:
            reference = self.reference_for(self.scenes[name])
            self.greedy[name] = reference.greedy(self.reference_inputs(name))
        return self.greedy[name]


@pytest.fixture(scope="session")
def labs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Lab]:
    """Gives a case's lab; a case is written to disk once."""
    made: dict[str, Lab] = {}

    def lab_of(case: Case) -> Lab:
        if case.name not in made:
            for package in case.needs:
                pytest.importorskip(package)
            made[case.name] = Lab(case, write_checkpoint(case, tmp_path_factory.mktemp(case.name)))
        return made[case.name]

    return lab_of
