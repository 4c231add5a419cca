"""Moondream 3 beyond the generic runner: tasks, and the places that detect and point give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import opsin
from opsin import families
from opsin.decoder.native import why_not
from opsin.errors import InputError
from opsin.families.base import Prompt
from opsin.grounding import Box, Point
from opsin.prompt.tasks import task_messages
from opsin.types import Event, SamplingParams

from .conftest import Lab
from .ours import BLOCK, Ours, answers, tokens
from .pictures import picture
from .ported_reference import PortedReference, oracle_module
from .zoo import moondream

PICTURES = (picture(1, 90, 70), picture(2, 200, 130), picture(3, 60, 100))


@pytest.fixture(params=moondream.CASES, ids=str)
def lab(request: pytest.FixtureRequest, labs: Callable[..., Lab]) -> Lab:
    """Both checkpoints, one after another."""
    return labs(request.param)


@pytest.fixture
def base(labs: Callable[..., Lab]) -> Lab:
    """The first checkpoint."""
    return labs(moondream.CASES[0])


def asked(ours: Ours, task: str, words: str, image: Image.Image) -> Prompt:
    """A prompt of a task."""
    messages = task_messages(ours.processor.family, task, words)
    return ours.processor.prepare(messages, images=[image])


def expected(
    reference: Any, folder: Path, prompt: Prompt, image: Image.Image, *, boxes: bool, most: int
) -> list[dict[str, float]]:
    """What the reference finds, given the same tokens."""
    message = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    inputs = oracle_module("moondream3").encode(folder, [message], [image], [], {})
    inputs["input_ids"] = torch.tensor([prompt.token_ids])
    found: list[dict[str, float]] = reference.model.places(inputs, boxes=boxes, most=most)
    return found


def text(events: Sequence[Event]) -> str:
    """All text of an answer."""
    return "".join(event.text for event in events)


def test_each_task_has_its_authors_tokens(base: Lab) -> None:
    templates = base.case.config["config"]["tokenizer"]["templates"]
    tokenizer = base.ours.processor.tokenizer
    picture_tokens = 1 + 25
    for task, words, template in (
        ("detect", "car", templates["detect"]),
        ("point", "red car", templates["point"]),
    ):
        ids = asked(base.ours, task, words, PICTURES[0]).token_ids[picture_tokens:]
        own = tokenizer.encode(f" {words}", add_special_tokens=False)
        assert ids == [*template["prefix"], *own, *template["suffix"]], task
    for task, length in (
        ("caption", "normal"),
        ("short_caption", "short"),
        ("long_caption", "long"),
    ):
        ids = asked(base.ours, task, "", PICTURES[0]).token_ids[picture_tokens:]
        assert ids == templates["caption"][length], task
    question = asked(base.ours, "query", "What?", PICTURES[0])
    assert question.token_ids == base.ours.processor.prepare("What?", images=PICTURES[:1]).token_ids


def test_the_published_config_leaves_the_templates_to_the_code() -> None:
    family = families.load({"model_type": "moondream3"}, {})
    names = {1: "<|md_reserved_0|>", 7235: "det", 476: "ect", 32708: "caption", 4059: "long"}
    family.name_tokens(names.get)
    item = family.prepare_image(picture(1, 1000, 500), {})
    assert item.num_tokens == 729
    assert item.features["pixel_values"].shape == (11, 3, 378, 378)
    detect = family.with_media([1, 7235, 476, 2, 99, 3], [item], {"image": 8})
    assert detect == [0, *[8] * 729, 1, 7235, 476, 2, 99, 3]
    assert family.with_media([1, 32708, 2, 4059, 3], [item], {"image": 8})[730:] == [
        1, 32708, 2, 4059, 3,
    ]  # fmt: skip
    assert family.with_media([99], [], {"image": 8}) == [0, 1, 15381, 2, 99, 3]
    assert family.decoder().layers[4].mlp.experts == 64
    assert family.atomic_spans(detect, [item]) == [(0, 730)]


def test_places_are_the_reference_s_alone_and_together(lab: Lab) -> None:
    """Requests in one batch, with and without places of their own, do not see each other."""
    wanted = [
        ("detect", "car", PICTURES[0]),
        ("point", "car", PICTURES[0]),
        ("detect", "dog", PICTURES[1]),
        ("point", "tree", PICTURES[2]),
    ]
    prompts = [asked(lab.ours, *each) for each in wanted]
    truth = [
        expected(lab.reference, lab.folder, prompt, image, boxes=task == "detect", most=5)
        for prompt, (task, _, image) in zip(prompts, wanted, strict=True)
    ]
    assert len({json.dumps(places) for places in truth}) == len(truth)
    plain = lab.ours.prompt(lab.scenes["one"])
    with lab.ours.engine() as engine:
        streams = [
            engine.stream(prompt, SamplingParams(max_tokens=15 if task == "detect" else 10))
            for prompt, (task, _, _) in zip(prompts, wanted, strict=True)
        ]
        beside = engine.stream(plain, SamplingParams(max_tokens=15, ignore_eos=True))
        together = [text(list(stream)) for stream in streams]
        assert tokens(list(beside)) == lab.reference_greedy("one")[:15]
        steps = engine.steps
        for prompt, places, (task, _, _), answer in zip(
            prompts, truth, wanted, together, strict=True
        ):
            name = "objects" if task == "detect" else "points"
            read = json.loads(answer)[name]
            assert [pytest.approx(place, abs=1e-6) for place in places] == read, task
            again = engine.stream(prompt, SamplingParams(max_tokens=3 * 5))
            assert text(list(again)).startswith(answer[:-2]), "from the cache"
        engine.scheduler.check_integrity()
    assert steps < 40


def test_a_request_that_loses_its_place_goes_on_where_it_was(base: Lab) -> None:
    prompts = [asked(base.ours, "detect", word, PICTURES[0]) for word in ("car", "dog", "tree")]
    with base.ours.engine() as engine:
        alone = [tokens(answers(engine, [prompt], count=40)[0]) for prompt in prompts]
    per_token = 4 * 2 * 64 * 4
    blocks = -(-(len(prompts[0].token_ids) + 41) // BLOCK) + 7
    with base.ours.engine(memory=per_token * BLOCK * blocks) as engine:
        preempted: list[int] = []
        again = engine.scheduler._preempt
        engine.scheduler._preempt = lambda one: (preempted.append(one.request_id), again(one))  # type: ignore[func-returns-value]
        batch = answers(engine, prompts, count=40)
        engine.scheduler.check_integrity()
    assert preempted
    assert [tokens(events) for events in batch] == alone


def test_an_answer_ends_where_the_model_says_so(base: Lab, tmp_path: Path) -> None:
    shutil.copytree(base.folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.text.lm_head.bias"][0] = 1e4
    save_file(weights, tmp_path / "model.safetensors")
    ours = Ours(base.case, tmp_path)
    prompt = asked(ours, "detect", "car", PICTURES[0])
    reference = PortedReference(tmp_path, "moondream3")
    assert expected(reference, tmp_path, prompt, PICTURES[0], boxes=True, most=5) == []
    with ours.engine() as engine:
        events = list(engine.stream(prompt, SamplingParams()))
    assert events[-1].finish_reason == "stop"
    assert text(events) == '{"objects": []}'


def test_regions_are_pixels_of_the_picture(base: Lab) -> None:
    model, processor = base.ours.model, base.ours.processor
    for task, kind in (("detect", Box), ("point", Point)):
        result = opsin.generate(
            model, processor, "car", PICTURES[1], task=task, max_tokens=6, verbose=False
        )
        (places,) = json.loads(result.text).values()
        assert len(result.regions) == len(places) > 0
        for region, place in zip(result.regions, places, strict=True):
            assert isinstance(region, kind)
            if isinstance(region, Point):
                assert (region.x, region.y) == pytest.approx((place["x"] * 200, place["y"] * 130))
            else:
                left = min(max(place["x_min"], 0), 1) * 200
                assert region.bounds[0] == pytest.approx(left)


def test_what_cannot_be_is_refused(base: Lab) -> None:
    ours = base.ours
    with pytest.raises(InputError, match="needs a picture"):
        ours.processor.prepare(task_messages(ours.processor.family, "detect", "car"))
    with pytest.raises(InputError, match="one picture at a time"):
        ours.processor.prepare("What?", images=PICTURES[:2])
    with pytest.raises(InputError, match="max_crops"):
        ours.processor.prepare("What?", images=PICTURES[:1], options={"max_crops": 0})
    with pytest.raises(InputError, match="form of their own"):
        opsin.generate(
            ours.model, ours.processor, "car", PICTURES[0], task="detect", regex="[a-z]+"
        )


def test_a_conversion_without_the_region_head_answers_questions(base: Lab, tmp_path: Path) -> None:
    shutil.copytree(base.folder, tmp_path, dirs_exist_ok=True)
    weights = {}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        short = name.removeprefix("model.")
        if short.startswith("region."):
            continue
        if short == "text.wte":
            short = "text.model.wte.weight"
        elif not short.startswith("text.lm_head"):
            short = short.replace("text.", "text.model.", 1)
        if not short.startswith("vision.proj_mlp"):
            short = short.replace("vision.", "vision.encoder.", 1)
        weights[short] = value
    save_file(weights, tmp_path / "model.safetensors")
    ours = Ours(base.case, tmp_path)
    with ours.engine() as engine:
        (events,) = answers(engine, [base.ours.prompt(base.scenes["one"])], count=8)
        assert tokens(events) == base.reference_greedy("one")[:8]
        with pytest.raises(InputError, match="cannot detect or point"):
            engine.stream(asked(ours, "point", "car", PICTURES[0]), SamplingParams())


def test_why_the_decoder_runs_in_torch_is_said(base: Lab) -> None:
    assert why_not(base.ours.model.decoder.config) == "its blocks run side by side"
