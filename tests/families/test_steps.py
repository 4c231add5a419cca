"""`prepare_inputs` and `generate_step`: the same answer, token by token, from tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import opsin
from opsin.errors import InputError

from .checkpoints import Case
from .conftest import Lab
from .ours import BLOCK, _filled
from .scenes import Scene
from .test_families import is_ported
from .zoo import CASES

FIRST = {case.served_type or case.family: case for case in reversed(CASES) if is_ported(case)}
COUNT = 6


@pytest.fixture(params=sorted(FIRST))
def lab(request: pytest.FixtureRequest, labs: Callable[[Case], Lab]) -> Lab:
    """One checkpoint of each family."""
    return labs(FIRST[request.param])


def inputs_of(lab: Lab, scene: Scene) -> dict[str, torch.Tensor]:
    """A scene as a dictionary of tensors."""
    pictures, sounds = iter(scene.images), iter(scene.audio)
    messages = [
        {**message, "content": [_filled(part, pictures, sounds) for part in message["content"]]}
        for message in scene.messages
    ]
    kwargs = dict(lab.case.processor_kwargs)
    return opsin.prepare_inputs(lab.ours.processor, prompts=messages, processor_kwargs=kwargs)


def steps(lab: Lab, inputs: dict[str, torch.Tensor], **changes: Any) -> list[tuple[int, Any]]:
    """What `generate_step` yields."""
    given = {**inputs, **changes}
    options = {"max_tokens": COUNT, "ignore_eos": True, "memory": 1 << 25, "block_size": BLOCK}
    return list(opsin.generate_step(given.pop("input_ids"), lab.ours.model, **given, **options))


def stop(lab: Lab) -> None:
    """Close the engine that the calls have started."""
    model: Any = lab.ours.model
    if model.engine is not None:
        model.engine.close()
        model.engine = None


def test_steps_are_the_reference_s_tokens(lab: Lab) -> None:
    try:
        for name, scene in lab.scenes.items():
            inputs = inputs_of(lab, scene)
            assert all(isinstance(value, torch.Tensor) for value in inputs.values())
            assert inputs["input_ids"].shape == inputs["attention_mask"].shape
            said = steps(lab, inputs)
            assert [token for token, _ in said] == lab.reference_greedy(name)[:COUNT], name
    finally:
        stop(lab)


def test_features_are_taken_as_they_are_now(labs: Callable[[Case], Lab]) -> None:
    lab = labs(FIRST["qwen2_vl"])
    inputs = inputs_of(lab, lab.scenes["three"])
    before = steps(lab, inputs)
    blank = torch.zeros_like(inputs["pixel_values"])
    after = steps(lab, inputs, pixel_values=blank)
    assert not torch.allclose(before[0][1], after[0][1])
    assert steps(lab, inputs)[0][0] == before[0][0]
    with pytest.raises(InputError, match="not the ones"):
        steps(lab, inputs, input_ids=inputs["input_ids"].tolist())
    with pytest.raises(InputError, match="pixel_value is not"):
        steps(lab, inputs, pixel_value=blank)
    plain = inputs_of(lab, lab.scenes["text"])["input_ids"].tolist()[0]
    assert [t for t, _ in steps(lab, {"input_ids": plain})] == lab.reference_greedy("text")[:COUNT]
    stop(lab)
