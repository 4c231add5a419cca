"""What Gemma 3n's configs and sounds may be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from opsin import kernels
from opsin.decoder.config import SparseMLPConfig
from opsin.errors import CheckpointError, MediaError
from opsin.families.gemma3n import Gemma3n

from .checkpoints import Case
from .conftest import Lab
from .pictures import sound
from .zoo import gemma3n, gemma_more

GEMMA4 = next(case for case in gemma_more.CASES if case.family == "gemma4" and case.audio)
KERNELS = kernels.select(torch.device("cpu"))


def family(**changes: Any) -> Gemma3n:
    """The family of a tiny config in which parts are changed."""
    config: dict[str, Any] = copy.deepcopy(dict(gemma3n.CASES[0].config))
    for name, part in changes.items():
        config[name] = {**config[name], **part} if isinstance(part, dict) else part
    return Gemma3n(config, {})


def test_a_config_that_states_nothing_is_the_largest_model() -> None:
    largest = Gemma3n({"model_type": "gemma3n"}, {})
    decoder = largest.decoder()
    assert len(decoder.layers) == 35
    sparse = [isinstance(layer.mlp, SparseMLPConfig) for layer in decoder.layers]
    assert sparse == [True] * 10 + [False] * 25
    shared = {layer.attention.shared_from for layer in decoder.layers[20:]}  # type: ignore[union-attr]
    assert shared == {18, 19}
    assert [layer.attention.window for layer in decoder.layers[:5]] == [512] * 4 + [None]  # type: ignore[union-attr]
    with torch.device("meta"):
        towers = largest.towers(KERNELS)
    assert sum(parameter.numel() for parameter in towers.parameters()) == pytest.approx(983e6, 0.01)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"vision_config": {"architecture": "resnet50"}}, "its vision tower is a resnet50"),
        ({"audio_config": {"conf_attention_context_right": 2}}, "conf_attention_context_right"),
        ({"audio_config": {"sscp_conv_stride_size": [[2, 2], [1, 2]]}}, "sscp_conv_stride_size"),
        ({"audio_config": {"vocab_size": 5}}, "not the last of the vocabulary"),
    ],
)
def test_a_config_of_another_model_is_refused(changes: dict[str, Any], what: str) -> None:
    changed = family(**changes)
    broken = changed.decoder if "vocabulary" in what else lambda: changed.towers(KERNELS)
    with torch.device("meta"), pytest.raises(CheckpointError, match=what):
        broken()


@pytest.mark.parametrize("case", [gemma3n.CASES[0], GEMMA4], ids=str)
def test_a_sound_of_a_few_samples_is_refused(labs: Callable[[Case], Lab], case: Case) -> None:
    kind = labs(case).ours.processor.family
    for count in (0, 1, 128):
        with pytest.raises(MediaError, match="too short"):
            kind.prepare_audio(np.zeros(count, np.float32), {})


def test_sounds_may_be_so_short_and_so_long(labs: Callable[[Case], Lab]) -> None:
    kind = labs(gemma3n.CASES[0]).ours.processor.family
    assert kind.prepare_audio(sound(1, 1.0)[:513], {}).num_tokens == 24
    with pytest.raises(MediaError, match="at least 33 milliseconds"):
        kind.prepare_audio(sound(1, 1.0)[:500], {})
    with pytest.raises(MediaError, match=r"too long \(4\.0 seconds\)"):
        kind.prepare_audio(np.zeros(64000, np.float32), {})
    longest = family(audio_soft_tokens_per_image=188)
    assert longest.prepare_audio(np.zeros(480000, np.float32), {}).num_tokens == 188
    with pytest.raises(MediaError, match="up to 30 seconds"):
        longest.prepare_audio(np.zeros(480001, np.float32), {})
