"""The scheduler and its block pool, as pure bookkeeping over integers."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.engine.blocks import BlockPool
from opsin.engine.scheduler import Scheduler
from opsin.engine.sequence import Sequence
from opsin.families.base import Prompt
from opsin.types import SamplingParams


def sequence(number: int, length: int, spans: list[tuple[int, int]] | None = None) -> Sequence:
    prompt = Prompt(list(range(length)), torch.arange(length)[None], length, [], spans or [])
    return Sequence.start(number, prompt, SamplingParams())


def scheduler(blocks: int = 16, size: int = 4, seqs: int = 4, tokens: int = 32) -> Scheduler:
    return Scheduler(BlockPool(blocks), size, max_num_seqs=seqs, max_num_batched_tokens=tokens)


def run_step(plan: Scheduler) -> list[tuple[int, int, int]]:
    """One step in which every sampled sequence gets a token."""
    step = plan.schedule()
    plan.computed(step)
    for scheduled in step:
        if scheduled.samples:
            scheduled.sequence.token_ids.append(0)
    return [(s.sequence.request_id, s.start, s.end) for s in step]


def test_a_prompt_is_cut_into_chunks_then_decodes_one_token_a_step() -> None:
    plan = scheduler(tokens=8)
    plan.add(sequence(0, 20))
    assert [run_step(plan) for _ in range(5)] == [
        [(0, 0, 8)],
        [(0, 8, 16)],
        [(0, 16, 20)],
        [(0, 20, 21)],
        [(0, 21, 22)],
    ]


def test_running_sequences_come_before_waiting_ones_and_share_the_budget() -> None:
    plan = scheduler(tokens=8)
    plan.add(sequence(0, 4))
    plan.add(sequence(1, 10))
    assert run_step(plan) == [(0, 0, 4), (1, 0, 4)]
    assert run_step(plan) == [(0, 4, 5), (1, 4, 10)]
    assert run_step(plan) == [(0, 5, 6), (1, 10, 11)]


def test_no_more_sequences_run_than_there_are_places() -> None:
    plan = scheduler(seqs=2)
    for number in range(3):
        plan.add(sequence(number, 3))
    assert [entry[0] for entry in run_step(plan)] == [0, 1]
    plan.finish(plan.running[0])
    assert [entry[0] for entry in run_step(plan)] == [1, 2]


def test_without_blocks_the_last_sequence_gives_way_and_later_recomputes() -> None:
    plan = scheduler(blocks=4, size=4)
    first, second = sequence(0, 8), sequence(1, 8)
    plan.add(first)
    plan.add(second)
    assert run_step(plan) == [(0, 0, 8), (1, 0, 8)]
    assert run_step(plan) == [(0, 8, 9)]
    assert (second.num_computed, second.block_table, second.num_preemptions) == (0, [], 1)
    plan.finish(first)
    assert run_step(plan) == [(1, 0, 9)]
    plan.check_integrity()


def test_an_atomic_span_is_never_cut() -> None:
    plan = scheduler(tokens=8)
    plan.add(sequence(0, 20, [(5, 17)]))
    assert run_step(plan) == [(0, 0, 5)]
    assert run_step(plan) == [(0, 5, 17)]
    assert run_step(plan) == [(0, 17, 20)]


def test_a_sequence_grows_into_neighbouring_blocks_when_they_are_free() -> None:
    pool = BlockPool(8)
    first = pool.allocate(2)
    assert first == [0, 1]
    assert pool.allocate(1, after=1) == [2]
    other = pool.allocate(1)
    assert other == [3]
    assert pool.allocate(1, after=2) == [4]
    pool.release([3])
    assert pool.allocate(1) == [3]


def test_a_pool_refuses_what_it_has_not() -> None:
    pool = BlockPool(2)
    assert pool.allocate(3) is None
    assert pool.num_free == 2


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    blocks=st.integers(12, 30),
    size=st.integers(1, 5),
    seqs=st.integers(1, 5),
    budget=st.integers(1, 24),
    cancels=st.lists(st.integers(0, 7), max_size=4),
)
def test_every_sequence_is_computed_in_order_and_nothing_is_lost(
    lengths: list[int], blocks: int, size: int, seqs: int, budget: int, cancels: list[int]
) -> None:
    plan = scheduler(blocks, size, seqs, budget)
    wanted = 3
    alive = {}
    for number, length in enumerate(lengths):
        if plan.can_ever_run(length + wanted + 1):
            alive[number] = sequence(number, length)
            plan.add(alive[number])
    computed = dict.fromkeys(alive, 0)
    for turn in range(2000):
        if not plan.has_work:
            break
        if turn < len(cancels) and cancels[turn] in alive:
            plan.finish(alive.pop(cancels[turn]))
            plan.check_integrity()
            continue
        step = plan.schedule()
        assert step, "there is work but nothing was scheduled"
        assert len(step) <= seqs
        assert sum(s.end - s.start for s in step) <= budget
        for s in step:
            number = s.sequence.request_id
            assert s.start == (computed[number] if s.sequence.num_preemptions == 0 else s.start)
            assert s.start == s.sequence.num_computed < s.end
            assert len(s.sequence.block_table) * size >= s.end
            computed[number] = s.end
        plan.computed(step)
        plan.check_integrity()
        for s in step:
            if s.samples:
                s.sequence.token_ids.append(0)
                if s.sequence.num_generated == wanted:
                    plan.finish(alive.pop(s.sequence.request_id))
    assert not plan.has_work
    assert plan.pool.num_free == blocks
