"""Every family's tiny checkpoints, as data."""

from __future__ import annotations

from ..checkpoints import Case
from . import idefics, llava, qwen

CASES: tuple[Case, ...] = (*qwen.CASES, *idefics.CASES, *llava.CASES)
