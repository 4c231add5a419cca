"""Every family against its reference, and against itself: a new family adds data, not tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from opsin import families
from opsin.errors import CheckpointError, InputError
from opsin.types import SamplingParams

from .checkpoints import Case
from .conftest import Lab
from .ours import answers, relative_error, tokens
from .pictures import picture
from .scenes import Scene, one_image
from .zoo import CASES, each

TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1 / 255
PIXELS = ("pixel_values", "image_pixel_values", "high_res_pixel_values", "pixel_values_images")
SIZES = ((90, 70), (31, 120), (200, 64), (8, 8))
EXTREME = (20000, 10)
ODD_SIZES = ((1, 1), (3000, 40), (40, 3000), EXTREME)


def is_ported(case: Case) -> bool:
    """Whether Opsin has this case's family; those that it lacks wait in the zoo for their port."""
    try:
        if case.served_type is not None:
            families.find(case.served_type)
            return True
        families.load(dict(case.config), dict(case.files.get("preprocessor_config.json", {})))
    except CheckpointError:
        return False
    return True


@pytest.fixture(params=each(case for case in CASES if is_ported(case)), ids=str)
def lab(request: pytest.FixtureRequest, labs: Callable[[Case], Lab]) -> Lab:
    """The lab of each ported family's cases, one after another."""
    return labs(request.param)


def test_the_reference_says_something(lab: Lab) -> None:
    """Tests of the tests: an answer that repeats one token would show nothing."""
    for name in lab.scenes:
        assert len(set(lab.reference_greedy(name))) >= lab.case.distinct, name


def test_token_ids_are_the_reference_s(lab: Lab) -> None:
    for name, scene in lab.scenes.items():
        expected = lab.reference_inputs(name)["input_ids"][0].tolist()
        assert lab.ours.prompt(scene).text_ids == expected, name


def test_pixels_are_the_reference_s(lab: Lab) -> None:
    if not lab.case.images:
        pytest.skip("takes no pictures")
    for width, height in SIZES:
        scene = one_image(f"{width}x{height}", picture(21, width, height))
        ours = lab.ours.prepare(scene).media[0]
        inputs = lab.encode(scene)
        for name in PIXELS:
            if name in inputs:
                close(ours.value(name), inputs[name], f"{name} of {scene.name}")


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Equal values in the same order; the reference may pad with zeros at the end."""
    got, expected = ours.flatten().float(), theirs.flatten().float()
    assert got.numel() <= expected.numel(), what
    assert not expected[got.numel() :].any(), f"{what}: values are missing"
    assert float((got - expected[: got.numel()]).abs().max()) <= PIXEL_TOLERANCE, what


def test_logits_are_the_reference_s(lab: Lab) -> None:
    for name, scene in lab.scenes.items():
        ours = lab.ours.logits(lab.ours.prompt(scene))
        theirs = lab.reference_logits(name)
        vocab = min(ours.shape[1], theirs.shape[1])
        assert relative_error(ours[:, :vocab], theirs[:, :vocab]) < TOLERANCE, name


def test_greedy_tokens_are_the_reference_s(lab: Lab) -> None:
    with lab.ours.engine() as engine:
        for name, scene in lab.scenes.items():
            (events,) = answers(engine, [lab.ours.prompt(scene)])
            assert tokens(events) == lab.reference_greedy(name), name
            assert events[-1].finish_reason == "length"


def test_batched_requests_answer_as_alone(lab: Lab) -> None:
    names = list(lab.scenes) * 2
    with lab.ours.engine() as engine:
        batch = answers(engine, [lab.ours.prompt(lab.scenes[name]) for name in names])
        steps = engine.steps
    for name, events in zip(names, batch, strict=True):
        assert tokens(events) == lab.reference_greedy(name), name
    assert steps < 64 * len(names), "the requests were not computed together"


def test_chunked_prefill_answers_as_whole(lab: Lab) -> None:
    names = list(lab.scenes)
    with lab.ours.engine(step=7) as engine:
        batch = answers(engine, [lab.ours.prompt(lab.scenes[name]) for name in names], count=24)
    for name, events in zip(names, batch, strict=True):
        assert tokens(events) == lab.reference_greedy(name)[:24], name


def test_cached_decode_equals_a_full_pass(lab: Lab) -> None:
    for name, scene in lab.scenes.items():
        prompt = lab.ours.prompt(scene)
        with lab.ours.engine() as engine:
            (events,) = answers(engine, [prompt], count=12, logprobs=1)
        answer = tokens(events)
        cached = [chosen.logprob for event in events for chosen in event.logprobs]
        whole = lab.ours.logits(prompt, answer)[len(prompt.token_ids) - 1 : -1]
        chosen = whole.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert cached == pytest.approx(chosen.tolist(), abs=2e-4), name


def test_another_image_gives_another_answer(lab: Lab) -> None:
    if not lab.case.images:
        pytest.skip("takes no pictures")
    one, another = (
        lab.ours.logits(lab.ours.prompt(lab.scenes[name]))[-1] for name in ("one", "another")
    )
    assert relative_error(one, another) > 0.05
    assert lab.reference_greedy("one") != lab.reference_greedy("another")


def test_odd_pictures_are_answered_or_refused(lab: Lab) -> None:
    """What the reference takes is answered; a refusal is an InputError; the next one is served."""
    if not lab.case.images:
        pytest.skip("takes no pictures")
    with lab.ours.engine() as engine:
        for width, height in ODD_SIZES:
            scene = one_image(f"{width}x{height}", picture(22, width, height))
            expected = reference_ids(lab, scene)
            try:
                prompt = lab.ours.prepare(scene)
                (events,) = answers(engine, [prompt], count=3)
            except InputError:
                assert expected is None or (width, height) == EXTREME, scene.name
            else:
                assert len(tokens(events)) == 3
                assert expected in (None, prompt.text_ids), scene.name
            (events,) = answers(engine, [lab.ours.prompt(lab.scenes["one"])], count=8)
            assert tokens(events) == lab.reference_greedy("one")[:8], "the next request"


def reference_ids(lab: Lab, scene: Scene) -> list[int] | None:
    """The reference's tokens, or None where it cannot take the picture either."""
    try:
        ids: list[int] = lab.encode(scene)["input_ids"][0].tolist()
    except (ValueError, RuntimeError, ZeroDivisionError):
        return None
    return ids


def test_a_cancelled_request_leaves_the_pool_as_it_was(lab: Lab) -> None:
    prompt = lab.ours.prompt(next(iter(lab.scenes.values())))
    with lab.ours.engine() as engine:
        before = engine.stats()["free_blocks"]
        stream = engine.stream(prompt, SamplingParams(max_tokens=4000, ignore_eos=True))
        taken = [event for event, _ in zip(stream, range(3), strict=False)]
        stream.close()
        answers(engine, [prompt], count=2)
        assert len(taken) == 3
        assert engine.stats()["free_blocks"] == before
        engine.scheduler.check_integrity()
