"""Every family's tiny checkpoints, as data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from ..checkpoints import Case
from . import (
    authors,
    deepseek,
    deepseek_vl_v2,
    deepseekocr,
    dots,
    ernie,
    florence,
    florence_published,
    gemma,
    gemma3n,
    gemma3n_more,
    gemma_more,
    idefics,
    jina_vlm,
    llama,
    llava,
    minicpmo,
    molmo,
    molmo_point,
    moondream,
    phi,
    phi3v,
    phi4_siglip,
    phi_adapters,
    qwen,
    qwen_more,
    vlm_backbones,
    vlm_more,
    voxtral,
)

CASES: tuple[Case, ...] = (
    *qwen.CASES,
    *idefics.CASES,
    *jina_vlm.CASES,
    *llava.CASES,
    *minicpmo.CASES,
    *moondream.CASES,
    *qwen_more.CASES,
    *vlm_more.CASES,
    *vlm_backbones.CASES,
    *gemma.CASES,
    *gemma_more.CASES,
    *gemma3n.CASES,
    *gemma3n_more.CASES,
    *llama.CASES,
    *deepseek.CASES,
    *deepseek_vl_v2.CASES,
    *deepseekocr.CASES,
    *dots.CASES,
    *ernie.CASES,
    *phi.CASES,
    *phi3v.CASES,
    *phi4_siglip.CASES,
    *florence.CASES,
    *florence_published.CASES,
    *voxtral.CASES,
    *molmo.CASES,
    *molmo_point.CASES,
    *authors.CASES,
    *phi_adapters.CASES,
)


def each(cases: Iterable[Case]) -> list[Any]:
    """Parameters of a fixture: the first case of each family, and the others as slow tests."""
    seen: set[str] = set()
    found = []
    for case in cases:
        marks = [pytest.mark.slow] if case.family in seen else []
        found.append(pytest.param(case, marks=marks))
        seen.add(case.family)
    return found
