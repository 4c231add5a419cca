"""Florence-2 beyond the generic runner: tasks, regions, and an encoder that reads every prompt."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import opsin
from opsin import families
from opsin.decoder.native import why_not
from opsin.engine import source
from opsin.engine.loop import Engine, EngineLimits
from opsin.errors import CheckpointError, InputError, PromptTooLong
from opsin.families.florence2_tasks import NAMED, TASKS, WORDS
from opsin.grounding import parse
from opsin.towers import davit
from opsin.types import SamplingParams

from .conftest import Lab
from .ours import BLOCK, Ours, answers, relative_error, tokens
from .pictures import picture
from .zoo import florence, florence_published

SIZE = (640, 480)
# What the reference's post-processor is told of its tasks, as the converted checkpoints state it.
READERS = {
    "ocr": {
        "PATTERN": r"(.+?)" + r"<loc_(\d+)>" * 8,
        "AREA_THRESHOLD": 0.0,
    },
    **{
        name: {}
        for name in (
            "phrase_grounding",
            "pure_text",
            "description_with_bboxes",
            "description_with_polygons",
            "polygons",
            "bboxes",
            "description_with_bboxes_or_polygons",
        )
    },
}
BOXED = "cat<loc_52><loc_332><loc_932><loc_774>red car<loc_0><loc_1><loc_998><loc_999>"
OUTLINED = "<poly><loc_5><loc_7><loc_100><loc_9><loc_50><loc_90></poly>"
ANSWERS = {
    "<OD>": BOXED,
    "<DENSE_REGION_CAPTION>": BOXED + "<loc_9><loc_8><loc_17><loc_16>",
    "<REGION_PROPOSAL>": "<loc_52><loc_332><loc_932><loc_774><loc_1><loc_2><loc_3><loc_4>",
    "<CAPTION_TO_PHRASE_GROUNDING>": "A cat" + BOXED[3:],
    "<OPEN_VOCABULARY_DETECTION>": BOXED,
    "<OCR_WITH_REGION>": "STOP" + "".join(f"<loc_{n}>" for n in (9, 10, 99, 12, 98, 50, 8, 48)),
    "<REFERRING_EXPRESSION_SEGMENTATION>": OUTLINED[6:-7] + "<sep><loc_1><loc_2><loc_3><loc_4>"
    "<loc_9><loc_5>",
    "<REGION_TO_SEGMENTATION>": OUTLINED[6:-7],
}


@pytest.fixture
def base(labs: Callable[..., Lab]) -> Lab:
    """The smaller checkpoint, as Transformers has it."""
    return labs(florence.CASES[0])


@pytest.fixture
def authors(labs: Callable[..., Lab]) -> Lab:
    """A checkpoint in the authors' layout."""
    return labs(florence_published.CASES[0])


def test_a_task_s_token_stands_for_the_words_of_the_reference(base: Lab) -> None:
    for token, words in WORDS.items():
        given = f"{token} a red car " if "{text}" in words else token
        (expected,) = base.reference.processor._construct_prompts(given)
        assert base.ours.processor.prepare(given).text == expected
    known = base.reference.processor
    assert set(WORDS) == {*known.task_prompts_without_inputs, *known.task_prompts_with_input}


def test_a_task_by_name_asks_with_the_same_tokens(base: Lab) -> None:
    image = picture(1, 90, 70)
    for token, name, words, _, _ in TASKS:
        text = "a cat" if "{text}" in words else ""
        named = NAMED[name].render(text)
        ours = base.ours.processor.prepare(named, images=[image]).text_ids
        encoded = base.reference.processor(text=f"{token}{text}", images=[image])
        assert ours == encoded["input_ids"][0], name


@pytest.mark.parametrize("token", ANSWERS)
def test_regions_are_the_reference_s(base: Lab, token: str) -> None:
    answer = f"</s><s>{ANSWERS[token]}</s>"
    reference = base.reference.processor
    reference.post_processor.parse_task_config = READERS
    told = reference.post_process_generation(text=answer, task=token, image_size=SIZE)[token]
    expected = [
        *told.get("bboxes", ()),
        *told.get("quad_boxes", ()),
        *(outline for group in told.get("polygons", ()) for outline in group),
    ]
    labels = told.get("labels", told.get("bboxes_labels", []))
    ways = {row[0]: row[4] for row in TASKS}[token]
    ids = base.ours.processor.tokenizer.encode(answer, add_special_tokens=False)
    found = parse(ids, base.ours.processor, SIZE, grounding=ways)
    assert expected
    assert len(found) == len(expected)
    for region, corners in zip(found, expected, strict=True):
        flat = [value for pair in region.points for value in pair]
        assert [int(value) for value in flat] == corners  # the reference drops parts of a pixel
    assert [region.label for region in found][: len(labels)] == labels


def test_a_prompt_that_cannot_be_meant_is_refused(base: Lab) -> None:
    processor, image = base.ours.processor, picture(1, 90, 70)
    with pytest.raises(InputError, match="one picture at a time"):
        processor.prepare("<CAPTION>", images=[image, image])
    with pytest.raises(InputError, match="takes no words"):
        processor.prepare("<OD> of cats", images=[image])
    with pytest.raises(InputError, match="needs words"):
        processor.prepare("<REGION_TO_OCR>", images=[image])
    with pytest.raises(InputError, match="place for 1 images but 0 came"):
        processor.prepare("<image>What is it?")
    with base.ours.engine() as engine, pytest.raises(InputError, match="empty"):
        engine.stream(processor.prepare(""), SamplingParams())


def test_the_placeholder_may_stand_in_the_prompt(base: Lab) -> None:
    prepare, image = base.ours.processor.prepare, picture(1, 90, 70)
    with_word = prepare("<image><CAPTION>", images=[image])
    assert with_word.text_ids == prepare("<CAPTION>", images=[image]).text_ids


def test_what_the_encoder_reads_counts_as_the_prompt(base: Lab) -> None:
    prompt = base.ours.processor.prepare("<CAPTION>", images=[picture(1, 90, 70)])
    with base.ours.engine() as engine:
        (events,) = answers(engine, [prompt], count=2)
    usage = events[-1].usage
    assert usage.prompt_tokens == len(base.reference.processor.tokenizer(prompt.text).input_ids) + 8
    assert usage.media_tokens == {"image": 10}
    assert prompt.token_ids == [2, 0]


def test_a_prompt_longer_than_the_encoder_s_positions_is_refused(base: Lab) -> None:
    limit = base.ours.model.decoder.config.max_positions
    ids = base.ours.processor.tokenizer.encode("cat", add_special_tokens=False)[:1]
    with base.ours.engine() as engine:
        (events,) = answers(engine, [base.ours.processor.of_tokens(ids * limit)], count=2)
        assert len(tokens(events)) == 2
        with pytest.raises(PromptTooLong, match=f"has {limit + 1} tokens"):
            engine.stream(base.ours.processor.of_tokens(ids * (limit + 1)), SamplingParams())


def test_tokens_of_places_are_part_of_the_text(base: Lab, authors: Lab) -> None:
    for lab in (base, authors):
        place = lab.ours.processor.tokenizer.require_id("<loc_7>")
        result = opsin.generate(
            lab.ours.model,
            lab.ours.processor,
            "<OD>",
            picture(1, 90, 70),
            logit_bias={place: 1000.0},
            max_tokens=4,
        )
        assert result.text == "<loc_7>" * 4
        (region,) = result.regions
        assert region.bounds == pytest.approx((0.675, 0.525, 0.675, 0.525))


def test_the_authors_tokens_get_the_ids_of_the_converted_tokenizer(authors: Lab) -> None:
    tokenizer = authors.ours.processor.tokenizer
    expected = florence_published.WHOLE.ids
    for token in florence_published.ADDED:
        assert tokenizer.token_to_id(token) == expected[token]
    assert authors.ours.processor.media_token_ids == {"image": expected["<image>"]}
    assert authors.ours.model.decoder.config.blank_ids == (expected["<image>"],)


def test_the_bias_of_the_head_is_added(authors: Lab, tmp_path: Path) -> None:
    shutil.copytree(authors.published, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    bias = torch.randn_like(weights["language_model.final_logits_bias"])
    weights["language_model.final_logits_bias"] = bias
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    prompt = authors.ours.prompt(authors.scenes["one"])
    biased = Ours(authors.case, tmp_path).logits(prompt)
    assert relative_error(biased - bias, authors.ours.logits(prompt)) < 1e-5


def test_a_head_of_its_own_is_read(base: Lab, tmp_path: Path) -> None:
    shutil.copytree(base.folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = load_file(tmp_path / "model.safetensors")
    shared = weights["model.language_model.shared.weight"]
    save_file({**weights, "lm_head.weight": 2 * shared}, tmp_path / "model.safetensors")
    prompt = base.ours.prompt(base.scenes["one"])
    doubled = Ours(base.case, tmp_path).logits(prompt)
    assert relative_error(doubled, 2 * base.ours.logits(prompt)) < 1e-5


def test_the_authors_way_against_repetition_is_the_default(base: Lab, tmp_path: Path) -> None:
    shutil.copytree(base.folder, tmp_path, dirs_exist_ok=True)
    stated = json.loads((tmp_path / "generation_config.json").read_text())
    stated["no_repeat_ngram_size"] = 2
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    ours = Ours(base.case, tmp_path)
    inputs = base.reference._accepted(base.reference_inputs("one"))
    expected = base.reference.model.generate(
        **inputs,
        decoder_input_ids=torch.tensor([[2, 0]]),
        max_new_tokens=64,
        no_repeat_ngram_size=2,
    )[0, 2:].tolist()
    with ours.engine() as engine:
        (events,) = answers(engine, [ours.prompt(base.scenes["one"])])
        (free,) = answers(engine, [ours.prompt(base.scenes["one"])], no_repeat_ngram_size=0)
    assert tokens(events) == expected
    assert tokens(free) == base.reference_greedy("one") != expected


def test_a_picture_asked_twice_is_seen_once(base: Lab) -> None:
    image = picture(1, 90, 70)
    prompts = [
        base.ours.processor.prepare(words, images=[image]) for words in ("<CAPTION>", "<OD>")
    ]
    alone = []
    for prompt in prompts:
        with base.ours.engine() as engine:
            alone.append(tokens(answers(engine, [prompt], count=12)[0]))
    with base.ours.engine() as engine:
        shared = [tokens(answers(engine, [prompt], count=12)[0]) for prompt in prompts]
        stats = engine.stats()
    assert shared == alone
    assert alone[0] != alone[1]
    assert (stats["encoded_hits"], stats["encoded_misses"]) == (1, 1)


def test_preempted_requests_read_their_prompts_again(base: Lab) -> None:
    names = ["one", "another"] * 2
    prompts = [base.ours.prompt(base.scenes[name]) for name in names]
    # Text blocks for about one answer and a half, source blocks for all prompts.
    per_row = 2 * 2 * 40 * 4
    rows = sum(-(-len(prompt.text_ids) // BLOCK) * BLOCK for prompt in prompts)
    with base.ours.engine(memory=2 * rows * per_row) as engine:
        preempted: list[int] = []
        again = engine.scheduler._preempt
        engine.scheduler._preempt = lambda one: (preempted.append(one.request_id), again(one))  # type: ignore[func-returns-value]
        batch = answers(engine, prompts)
        engine.scheduler.check_integrity()
    assert preempted
    for name, events in zip(names, batch, strict=True):
        assert tokens(events) == base.reference_greedy(name), name


def test_prompts_and_pictures_in_small_groups_give_the_same(
    base: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "GROUP_TOKENS", 1)
    monkeypatch.setattr(davit, "GROUP_PLACES", 1)
    names = list(base.scenes)
    with base.ours.engine(step=1) as engine:
        batch = answers(engine, [base.ours.prompt(base.scenes[name]) for name in names], count=12)
    for name, events in zip(names, batch, strict=True):
        assert tokens(events) == base.reference_greedy(name)[:12], name


def test_a_context_that_is_set_bounds_prompt_and_answer_each(base: Lab) -> None:
    prompt = base.ours.prompt(base.scenes["one"])
    length = len(prompt.text_ids)
    limits = EngineLimits(memory=1 << 24, block_size=BLOCK, max_context=length)
    with Engine(base.ours.model, base.ours.processor, limits) as engine:
        (events,) = answers(engine, [prompt])
    assert events[-1].finish_reason == "length"
    assert len(tokens(events)) == length - 2


def test_the_published_base_model_is_read() -> None:
    """The authors' config.json leaves out what their classes fill in."""
    config: dict[str, Any] = {
        "model_type": "florence2",
        "text_config": {
            "model_type": "florence2_language",
            "vocab_size": 51289,
            "d_model": 768,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
            "no_repeat_ngram_size": 3,
        },
        "vision_config": {"model_type": "davit", "projection_dim": 768},
    }
    size = {"height": 768, "width": 768}
    family = families.load(config, {"size": size, "crop_size": size, "do_center_crop": False})
    assert family.prepare_image(picture(1, 30, 20), {}).num_tokens == 577
    assert family.no_repeat_ngram == (3, None, ())
    assert family.decoder_start == (2, 0)
    assert family.decoder().blank_ids == (51289,)


def test_why_the_decoder_runs_in_torch_is_said(base: Lab) -> None:
    assert why_not(base.ours.model.decoder.config) == "it normalises the stream after each block"


def test_features_of_another_kind_are_refused() -> None:
    vision = {"image_feature_source": ["last_frame"]}
    config = {
        "model_type": "florence2",
        "text_config": {"vocab_size": 51289},
        "vision_config": vision,
    }
    with pytest.raises(CheckpointError, match="last_frame"):
        families.load(config, {})


def test_more_places_than_positions_are_refused() -> None:
    config = {"model_type": "florence2", "text_config": {"vocab_size": 51289}}
    family = families.load(config, {"size": {"height": 768, "width": 1664}})
    with pytest.raises(CheckpointError, match="52 x 24 places"):
        family.prepare_image(picture(1, 30, 20), {})
