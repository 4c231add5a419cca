"""Every family's tiny checkpoints, as data."""

from __future__ import annotations

from ..checkpoints import Case
from . import (
    authors,
    deepseek,
    ernie,
    florence,
    florence_published,
    gemma,
    gemma3n,
    gemma3n_more,
    gemma_more,
    idefics,
    llama,
    llava,
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
    *llava.CASES,
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
    *ernie.CASES,
    *phi.CASES,
    *phi3v.CASES,
    *phi4_siglip.CASES,
    *florence.CASES,
    *florence_published.CASES,
    *voxtral.CASES,
    *authors.CASES,
    *phi_adapters.CASES,
)
