"""Holds a model's reasoning to a budget of tokens, by closing the block when it is spent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsin.engine.sampler import LogitsProcessor


def thinking_budget(budget: int, start: Sequence[int], end: Sequence[int]) -> LogitsProcessor:
    """Forces the tokens of the closing tag after `budget` tokens of reasoning.

    start: the opening tag's tokens, empty if the prompt has opened the block already.
    """

    def process(logits: Tensor, token_ids: Sequence[int], num_prompt: int) -> Tensor:
        generated = list(token_ids[num_prompt:])
        opened = _find(generated, start)
        if opened is None or _find(generated[opened:], end) is not None:
            return logits
        reasoning = generated[opened:]
        written = _overlap(reasoning, end)
        if len(reasoning) - written < budget:
            return logits
        forced = torch.full_like(logits, -torch.inf)
        forced[end[written]] = 0.0
        return forced

    return process


def _find(tokens: Sequence[int], wanted: Sequence[int]) -> int | None:
    """The place after the first run of the wanted tokens, None where there is none."""
    for i in range(len(tokens) - len(wanted) + 1):
        if list(tokens[i : i + len(wanted)]) == list(wanted):
            return i + len(wanted)
    return None


def _overlap(tokens: Sequence[int], wanted: Sequence[int]) -> int:
    """How many of the wanted tokens stand at the end already."""
    longest = min(len(tokens), len(wanted) - 1)
    for count in range(longest, 0, -1):
        if list(tokens[-count:]) == list(wanted[:count]):
            return count
    return 0
