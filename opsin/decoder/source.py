"""What cross-attention layers of one step read: the encoded media, one run of rows a sequence."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SourceStep:
    """The source rows of a step's sequences: those that are new, and where all of them lie.

    Letters: n new rows, t new tokens, s sequences. `states` (n, hidden) are the rows of the
    sequences that start in this step, `slot_mapping` (n,) their cache slots. Sequence i owns the
    tokens query_start[i] up to query_start[i + 1] and reads the rows in slots[i], of which token j
    sees those where masks[i] (tokens of i, rows) is True, or all without a mask. `present` (t, 1)
    is 1 for tokens whose sequence has a source, `seen` (t, 1) for those that see some of it.
    """

    states: Tensor
    slot_mapping: Tensor
    query_start: list[int]
    slots: list[slice | Tensor]
    masks: list[Tensor | None]
    present: Tensor
    seen: Tensor
