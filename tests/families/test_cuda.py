"""The same answers on an NVIDIA GPU as on the CPU, family by family."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import opsin
from opsin.engine.loop import Engine, EngineLimits

from .checkpoints import Case
from .conftest import Lab
from .ours import BLOCK, answers, tokens
from .test_families import is_ported
from .zoo import CASES

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


@pytest.mark.parametrize("case", [case for case in CASES if is_ported(case)], ids=str)
def test_fp32_tokens_are_those_of_the_cpu(case: Case, labs: Callable[[Case], Lab]) -> None:
    lab = labs(case)
    names = list(lab.scenes)
    with lab.ours.engine() as engine:
        alone = [answers(engine, [lab.ours.prompt(lab.scenes[name])])[0] for name in names]
    model, processor = opsin.load(lab.published, device="cuda")
    limits = EngineLimits(memory=1 << 25, block_size=BLOCK)
    with Engine(model, processor, limits) as engine:
        batch = answers(engine, [lab.ours.prompt(lab.scenes[name]) for name in names])
    for name, expected, events in zip(names, alone, batch, strict=True):
        assert tokens(events) == tokens(expected), name
