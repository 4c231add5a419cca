"""Penalties, truncation and draws, each against its definition."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opsin.engine.sampler import Sampler, truncated
from opsin.types import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def sample(params: SamplingParams, tokens: list[int] | None = None, prompt: int = 0) -> int:
    return Sampler.of(params).sample(LOGITS.clone(), tokens or [], prompt)[0]


def kept(params: SamplingParams, logits: torch.Tensor = LOGITS) -> set[int]:
    return set(truncated(logits.log_softmax(0), params).isfinite().nonzero().flatten().tolist())


def test_greedy_takes_the_largest() -> None:
    assert sample(SamplingParams()) == 4


def test_top_k_keeps_the_k_likeliest() -> None:
    assert kept(SamplingParams(top_k=2)) == {0, 4}


def test_top_p_keeps_the_token_that_reaches_the_mass() -> None:
    probabilities = LOGITS.softmax(0)
    assert kept(SamplingParams(top_p=float(probabilities[4]) - 0.01)) == {4}
    assert kept(SamplingParams(top_p=float(probabilities[4]) + 0.01)) == {4, 0}
    assert kept(SamplingParams(top_p=1e-9)) == {4}


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert kept(SamplingParams(min_p=math.exp(-1.01))) == {4, 0}
    assert kept(SamplingParams(min_p=1.0)) == {4}


def test_repetition_penalty_pushes_seen_tokens_down_on_either_side_of_zero() -> None:
    assert sample(SamplingParams(repetition_penalty=2.0), [4]) == 0
    sampler = Sampler.of(SamplingParams(repetition_penalty=2.0, temperature=0))
    changed = sampler.chain[0](LOGITS.clone(), [3, 4], 0)
    assert changed.tolist() == [2.0, 1.0, 0.0, -2.0, 1.5]


def test_repetition_context_size_limits_how_far_back_it_looks() -> None:
    params = SamplingParams(repetition_penalty=2.0, repetition_context_size=1)
    assert sample(params, [4, 0]) == 4


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.3)
    assert sample(params, [4, 4, 4], prompt=3) == 4
    changed = Sampler.of(params).chain[0](LOGITS.clone(), [0, 4, 4], 1)
    assert changed.tolist() == pytest.approx([2.0, 1.0, 0.0, -1.0, 3.0 - 0.5 - 0.6])


def test_logit_bias_is_added() -> None:
    assert sample(SamplingParams(logit_bias={3: 100.0})) == 3
    assert sample(SamplingParams(logit_bias={4: -100.0})) == 0


def test_a_seed_repeats_the_draws_and_another_changes_them() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler.of(SamplingParams(temperature=2.0, seed=seed))
        return [sampler.sample(LOGITS.clone(), [], 0)[0] for _ in range(30)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler.of(SamplingParams(temperature=1.0, seed=0))
    count = 4000
    seen = Counter(sampler.sample(LOGITS.clone(), [], 0)[0] for _ in range(count))
    for token, probability in enumerate(LOGITS.softmax(0).tolist()):
        spread = 4 * math.sqrt(probability * (1 - probability) / count)
        assert abs(seen[token] / count - probability) < spread


def test_logprobs_are_the_models_own_with_the_likeliest_beside() -> None:
    params = SamplingParams(temperature=0.5, top_k=1, logprobs=2)
    token, logprob = Sampler.of(params).sample(LOGITS.clone(), [], 0)
    assert logprob is not None
    assert (token, logprob.token_id) == (4, 4)
    expected = LOGITS.log_softmax(0)
    assert logprob.logprob == pytest.approx(float(expected[4]))
    assert [t for t, _ in logprob.top] == [4, 0]
    assert logprob.top[1][1] == pytest.approx(float(expected[0]))


@given(
    top_k=st.integers(0, 7),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    values=st.lists(st.floats(-20, 20), min_size=1, max_size=6),
)
def test_truncation_never_leaves_nothing_and_never_the_likeliest_out(
    top_k: int, top_p: float, min_p: float, values: list[float]
) -> None:
    logits = torch.tensor(values)
    left = kept(SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p), logits)
    best = float(logits.max())
    assert any(values[i] == pytest.approx(best, abs=1e-4) for i in left)
