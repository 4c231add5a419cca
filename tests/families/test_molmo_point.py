"""MolmoPoint beyond the generic runner: points of requests side by side, and as regions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

import opsin
from opsin.grounding import extract_points_from_text
from opsin.grounding.parsing import pointing_metadata
from opsin.types import SamplingParams

from .conftest import Lab
from .ours import BLOCK, answers, tokens
from .pictures import picture
from .zoo import molmo_point

# The first checkpoint with the words that points are said with said more often.
POINTING = dataclasses.replace(
    molmo_point.CASES[0],
    variant="pointing",
    seed=1,
    gains=((r"new_output_embeddings$", 1.5), *molmo_point.CASES[0].gains),
)

SEVERAL = dataclasses.replace(POINTING, variant="several", seed=10)


@pytest.fixture(params=(POINTING, molmo_point.CASES[1]), ids=str)
def lab(request: pytest.FixtureRequest, labs: Callable[..., Lab]) -> Lab:
    """Checkpoints that point, one after another."""
    return labs(request.param)


@pytest.fixture
def base(labs: Callable[..., Lab]) -> Lab:
    """The first of them."""
    return labs(POINTING)


def test_pointing_requests_side_by_side_do_not_see_each_other(lab: Lab) -> None:
    """Their numbers of patches differ, and so does what the same number means."""
    own = lab.ours.model.decoder.config.vocab_size
    names = ["one", "large", "another", "text", "one"]
    prompts = [lab.ours.prompt(lab.scenes[name]) for name in names]
    with lab.ours.engine(step=64) as engine:
        batch = answers(engine, prompts, count=40)
        again = answers(engine, prompts[:1], count=40)
        engine.scheduler.check_integrity()
    for name, events in zip([*names, "one"], [*batch, *again], strict=True):
        assert tokens(events) == lab.reference_greedy(name)[:40], name
    assert any(token >= own for events in batch for token in tokens(events)), "nobody pointed"


def test_a_request_that_loses_its_place_reads_its_prompt_again(base: Lab) -> None:
    names = ["one", "another", "large"]
    prompts = [base.ours.prompt(base.scenes[name]) for name in names]
    per_token = 3 * 2 * 2 * 16 * 4
    blocks = -(-(len(prompts[2].token_ids) + 65) // BLOCK) + 9
    with base.ours.engine(memory=per_token * BLOCK * blocks) as engine:
        preempted: list[int] = []
        again = engine.scheduler._preempt
        engine.scheduler._preempt = lambda one: (preempted.append(one.request_id), again(one))  # type: ignore[func-returns-value]
        batch = answers(engine, prompts)
        engine.scheduler.check_integrity()
    assert preempted
    for name, events in zip(names, batch, strict=True):
        assert tokens(events) == base.reference_greedy(name), name


def test_points_are_written_by_their_numbers_and_read_as_regions(base: Lab) -> None:
    model, processor = base.ours.model, base.ours.processor
    own, image = model.decoder.config.vocab_size, picture(14, 150, 100)
    result = opsin.generate(model, processor, "cat", image, task="point", max_tokens=64)
    said = result.text
    numbers = [int(number) for number in re.findall(r"<POINT_([0-9]+)>", said)]
    prompt = processor.prepare("Point to cat.", images=[image])
    with base.ours.engine() as engine:
        events = list(engine.stream(prompt, SamplingParams(max_tokens=64)))
    assert numbers == [token - own for token in tokens(events) if token >= own]
    for region in result.regions:
        x, y = region.bounds[:2]
        assert 0 <= x <= 150
        assert 0 <= y <= 100


def test_an_answer_in_a_form_has_no_points(base: Lab) -> None:
    result = opsin.generate(
        base.ours.model, base.ours.processor, "What?", picture(1, 90, 70), regex="[ab]{3}"
    )
    assert re.fullmatch("[ab]{3}", result.text)


def test_points_on_several_pictures_are_regions_of_each(base: Lab) -> None:
    """A patch's number counts on from picture to picture."""
    pictures = [picture(1, 90, 70), picture(2, 60, 100)]
    prompt = base.ours.processor.prepare("Point to cats.", images=pictures)
    metadata = pointing_metadata(prompt.media)
    assert metadata is not None
    first, second = (item.num_tokens for item in prompt.media)
    # The last patch of each picture, its first part and the middle of that.
    part, middle = first + second + 1, first + second + 1 + 4 + 4
    text = " ".join(
        f"<POINT_{patch}> <POINT_{part}> <POINT_{middle}> {i}"
        for i, patch in enumerate((first - 1, first + second - 1))
    )
    points = extract_points_from_text(text, metadata)
    assert [(number, index) for number, index, _, _ in points] == [(0, 0), (1, 1)]
    for (width, height), (_, _, x, y) in zip(((90, 70), (60, 100)), points, strict=True):
        assert width * 0.7 < x < width
        assert height * 0.7 < y < height


def test_several_pictures_are_pointed_at_side_by_side(labs: Callable[..., Lab]) -> None:
    lab = labs(SEVERAL)
    own = lab.ours.model.decoder.config.vocab_size
    names = ["three", "turns"]
    with lab.ours.engine(step=64) as engine:
        batch = answers(engine, [lab.ours.prompt(lab.scenes[name]) for name in names])
    for name, events in zip(names, batch, strict=True):
        assert tokens(events) == lab.reference_greedy(name), name
        assert any(token >= own for token in tokens(events)), name


def test_words_between_pictures_are_not_seen_by_those_before(base: Lab) -> None:
    pictures = [picture(1, 90, 70), picture(2, 90, 70), picture(3, 60, 60)]
    prompt = base.ours.processor.prepare("Compare.", images=pictures)
    (span,) = prompt.atomic_spans
    assert prompt.sees_ahead is not None
    inside = prompt.sees_ahead[span[0] : span[1]]
    assert 0 < int((~inside).sum()) < 20
    assert not prompt.sees_ahead[: span[0]].any()
    assert not prompt.sees_ahead[span[1] :].any()
