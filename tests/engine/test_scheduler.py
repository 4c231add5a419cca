"""The scheduler and its block pool, as pure bookkeeping over integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.engine.blocks import BlockPool
from opsin.engine.pace import Pace
from opsin.engine.scheduler import Scheduler
from opsin.engine.sequence import Sequence
from opsin.families.base import Encoded, MediaInput, Prompt
from opsin.types import SamplingParams


def sequence(number: int, length: int, spans: list[tuple[int, int]] | None = None) -> Sequence:
    prompt = Prompt(list(range(length)), torch.arange(length)[None], length, [], spans or [])
    return Sequence.start(number, prompt, SamplingParams())


def scheduler(
    blocks: int = 16, size: int = 4, seqs: int = 4, tokens: int = 32, prefix_cache: bool = False
) -> Scheduler:
    return Scheduler(
        BlockPool(blocks),
        size,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        prefix_cache=prefix_cache,
    )


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
    prefix_cache=st.booleans(),
)
def test_every_sequence_is_computed_in_order_and_nothing_is_lost(
    lengths: list[int],
    blocks: int,
    size: int,
    seqs: int,
    budget: int,
    cancels: list[int],
    prefix_cache: bool,
) -> None:
    plan = scheduler(blocks, size, seqs, budget, prefix_cache)
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
            fresh = s.sequence.num_preemptions == 0 and not s.sequence.num_cached
            assert s.start == computed[number] or not fresh
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


def finish_alone(plan: Scheduler, number: int, tokens: list[int], **prompt: object) -> Sequence:
    """Run one prompt to its first token and take it out."""
    given = Prompt(tokens, torch.arange(len(tokens))[None], len(tokens), **prompt)  # type: ignore[arg-type]
    one = Sequence.start(number, given, SamplingParams())
    plan.add(one)
    while one.num_generated == 0:
        run_step(plan)
    plan.finish(one)
    plan.check_integrity()
    return one


def picture(key: bytes, indices: range) -> MediaInput:
    return MediaInput("image", {}, "", len(indices), key=key, indices=torch.tensor(list(indices)))


def test_a_prompt_that_begins_the_same_is_computed_from_where_it_differs() -> None:
    plan = scheduler(prefix_cache=True)
    assert finish_alone(plan, 0, list(range(10))).num_cached == 0
    assert finish_alone(plan, 1, list(range(10))).num_cached == 8
    assert finish_alone(plan, 2, [*range(6), 99, 98, 97]).num_cached == 4
    assert finish_alone(plan, 3, [99, *range(1, 10)]).num_cached == 0


def test_at_least_one_token_is_computed() -> None:
    plan = scheduler(prefix_cache=True)
    finish_alone(plan, 0, list(range(8)))
    assert finish_alone(plan, 1, list(range(8))).num_cached == 4


def test_generated_tokens_serve_the_next_turn() -> None:
    plan = scheduler(prefix_cache=True)
    first = sequence(0, 6)
    plan.add(first)
    for _ in range(4):
        run_step(plan)
    plan.finish(first)
    assert finish_alone(plan, 1, [*first.token_ids, 5, 5]).num_cached == 8


def test_the_picture_belongs_to_the_key_and_so_does_its_place() -> None:
    plan = scheduler(prefix_cache=True)
    tokens = [1, 7, 7, 7, 7, 7, 7, 2, 3]
    finish_alone(plan, 0, tokens, media=[picture(b"cat", range(1, 7))])
    assert finish_alone(plan, 1, tokens, media=[picture(b"cat", range(1, 7))]).num_cached == 8
    assert finish_alone(plan, 2, tokens, media=[picture(b"dog", range(1, 7))]).num_cached == 0
    halves = [picture(b"cat", range(1, 4)), picture(b"cat", range(4, 7))]
    assert finish_alone(plan, 3, tokens, media=halves).num_cached == 0
    nameless = [picture(b"", range(1, 7))]
    finish_alone(plan, 4, tokens, media=nameless)
    assert finish_alone(plan, 5, tokens, media=nameless).num_cached == 0


def test_another_salt_shares_nothing() -> None:
    plan = scheduler(prefix_cache=True)
    finish_alone(plan, 0, list(range(10)), cache_salt=b"one")
    assert finish_alone(plan, 1, list(range(10)), cache_salt=b"two").num_cached == 0
    assert finish_alone(plan, 2, list(range(10)), cache_salt=b"one").num_cached == 8


def test_a_match_that_cuts_an_atomic_span_goes_back_to_its_start() -> None:
    plan = scheduler(prefix_cache=True)
    finish_alone(plan, 0, list(range(12)), atomic_spans=[(4, 11)])
    other = [*range(10), 98, 99]
    assert finish_alone(plan, 1, other, atomic_spans=[(4, 11)]).num_cached == 4


def test_sequences_share_blocks_and_old_ones_make_room() -> None:
    plan = scheduler(blocks=8, prefix_cache=True)
    finish_alone(plan, 0, list(range(10)))
    both = [sequence(1, 10), sequence(2, 10)]
    for one in both:
        plan.add(one)
    run_step(plan)
    assert both[0].block_table[:2] == both[1].block_table[:2]
    plan.check_integrity()
    for one in both:
        plan.finish(one)
    assert (plan.pool.num_free, plan.pool.num_kept) == (8, 2)
    finish_alone(plan, 3, list(range(100, 130)))
    assert finish_alone(plan, 4, list(range(10))).num_cached == 0
    plan.pool.forget()
    assert (plan.pool.num_free, plan.pool.num_kept) == (8, 0)


def test_those_that_generate_come_before_prompts_that_came_earlier() -> None:
    plan = scheduler(blocks=64, tokens=8)
    plan.add(sequence(0, 30))
    plan.add(sequence(1, 3))
    assert run_step(plan) == [(0, 0, 5), (1, 0, 3)]
    plan.add(sequence(2, 100))
    assert run_step(plan) == [(1, 3, 4), (0, 5, 12)]
    assert run_step(plan) == [(1, 4, 5), (0, 12, 19)]


def test_a_long_prompt_takes_what_short_ones_leave_and_at_least_half() -> None:
    plan = scheduler(blocks=64, tokens=16, seqs=8)
    plan.add(sequence(0, 100))
    assert run_step(plan) == [(0, 0, 16)]
    plan.add(sequence(1, 2))
    assert run_step(plan) == [(0, 16, 30), (1, 0, 2)]
    plan.finish(plan.running[1])
    for number in (2, 3, 4):
        plan.add(sequence(number, 6))
    assert run_step(plan) == [(0, 30, 38), (2, 0, 6), (3, 0, 2)]


def test_prompts_are_bounded_by_the_time_that_they_take() -> None:
    pace = Pace(2048)
    assert pace.budget(0, 1) == 2048
    assert pace.budget(1, 1) == 256
    pace.observe(8, 1.0)  # too few to say anything
    assert pace.tokens_per_second is None
    assert pace.seconds(500) == 0.0
    pace.observe(1000, 1.0)
    assert pace.seconds(500) == 0.5
    assert (pace.budget(0, 1), pace.budget(1, 1)) == (1000, 250)
    pace.observe(1000, 100.0)  # a disturbed step does not spoil what is known
    assert pace.budget(0, 1) == 800
    pace.observe(10_000, 1.0)
    assert (pace.budget(0, 1), pace.budget(1, 1)) == (2048, 2048)
    for _ in range(60):
        pace.observe(100, 10.0)
    assert pace.budget(1, 1) == 128
    plan = scheduler(blocks=2000, size=16, tokens=2048)
    plan.pace.observe(100, 0.1)
    plan.add(sequence(0, 3))
    assert run_step(plan) == [(0, 0, 3)]
    plan.add(sequence(1, 5000))
    assert run_step(plan) == [(0, 3, 4), (1, 0, 250)]
    plan.finish(plan.running[0])
    assert run_step(plan) == [(1, 250, 1250)]


def test_many_prompts_that_wait_hold_up_a_few_requests_for_longer() -> None:
    pace = Pace(2048)
    pace.observe(800, 1.0)
    shares = [(1, 1), (4, 2), (1, 2), (4, 8), (1, 3), (1, 60)]
    assert [pace.budget(*share) for share in shares] == [200, 200, 400, 400, 600, 800]
    plan = scheduler(blocks=2000, size=16, seqs=16, tokens=2048)
    plan.pace.observe(1000, 1.0)
    plan.add(sequence(0, 3))
    run_step(plan)
    for number in range(1, 5):
        plan.add(sequence(number, 100))
    assert run_step(plan) == [(0, 3, 4), *((number, 0, 100) for number in range(1, 5))]


def three_pictures() -> Prompt:
    """Forty tokens, of which six each from 4, 12 and 20 on are a picture's."""
    pictures = [picture(bytes([first]), range(first, first + 6)) for first in (4, 12, 20)]
    return Prompt(list(range(40)), torch.arange(40)[None], 40, pictures, [])


def test_one_picture_a_step_while_others_generate() -> None:
    prompt = three_pictures()
    alone = scheduler(blocks=64, tokens=64)
    alone.add(Sequence.start(0, prompt, SamplingParams()))
    assert run_step(alone) == [(0, 0, 40)]
    plan = scheduler(blocks=64, tokens=64)
    plan.add(sequence(0, 3))
    run_step(plan)
    plan.add(Sequence.start(1, prompt, SamplingParams()))
    plan.add(Sequence.start(2, prompt, SamplingParams()))
    assert run_step(plan) == [(0, 3, 4), (1, 0, 12), (2, 0, 4)]
    assert run_step(plan) == [(0, 4, 5), (1, 12, 20)]
    assert run_step(plan) == [(0, 5, 6), (1, 20, 40)]
    assert run_step(plan) == [(0, 6, 7), (1, 40, 41), (2, 4, 12)]


def test_a_step_ends_where_a_picture_begins_that_can_be_encoded_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opsin.engine.scheduler.LEAST_TOKENS", 5)
    plan = scheduler(blocks=64, tokens=64)
    plan.leaves_media = True
    shown = Sequence.start(0, three_pictures(), SamplingParams())
    plan.add(shown)
    assert shown.next_medium(4) == 0
    assert run_step(plan) == [(0, 0, 12)]  # four tokens before the first are too few
    assert shown.next_medium(12) == 1
    shown.encoded[1] = Encoded(torch.zeros(6, 1))
    assert shown.next_medium(12) is None  # one is ready, no more are made so far ahead
    assert run_step(plan) == [(0, 12, 20)]
    assert shown.next_medium(20) == 2
    assert run_step(plan) == [(0, 20, 40)]
    assert shown.next_medium(40) is None
