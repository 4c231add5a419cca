"""Every family's tiny checkpoints, as data."""

from __future__ import annotations

from ..checkpoints import Case
from . import gemma, idefics, llava, qwen, qwen_more, vlm_more

CASES: tuple[Case, ...] = (
    *qwen.CASES,
    *idefics.CASES,
    *llava.CASES,
    *qwen_more.CASES,
    *vlm_more.CASES,
    *gemma.CASES,
)
