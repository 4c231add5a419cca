"""The shipped model: its folder, what it reads and counts, and Opsin against Transformers."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import opsin
from training.bundled import scoring
from training.bundled.engine import TransformersEngine, preprocess
from training.bundled.sample import Turn

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "opsin" / "models" / "bundled"
CASES = json.loads((ROOT / "tests/bundled/cases.json").read_text(encoding="utf-8"))
HELD_OUT = json.loads((ROOT / "tests/bundled/heldout/labels.json").read_text(encoding="utf-8"))
# The kept pictures are few, so these floors are looser than bench/accuracy.py's targets.
ERROR_CEILING = {"line_cer": 0.01, "paragraph_cer": 0.03}
FLOOR = {
    "receipt_total_accuracy": 1.0,
    "shape_accuracy": 0.97,
    "shape_box_iou": 0.8,
    "text_box_iou": 0.8,
    "table_cell_accuracy": 0.95,
}


@pytest.fixture(scope="module")
def bundled() -> tuple[Any, Any]:
    """The shipped model on the CPU in fp32."""
    return opsin.load("bundled", device="cpu", dtype="float32")


def ask(bundled: tuple[Any, Any], rows: list[dict[str, str]]) -> list[str]:
    """The answers to rows of cases.json or labels.json, as one batch."""
    model, processor = bundled
    results = opsin.batch_generate(
        model,
        processor,
        images=[str(ROOT / row["image"]) for row in rows],
        prompts=[row["question"] for row in rows],
        max_tokens=512,
    )
    return [result.text for result in results]


def test_the_folder_is_small_and_whole() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert {"preprocessor_config.json", "generation_config.json", "MODEL_CARD.md"} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12_000_000


@pytest.mark.parametrize("image", sorted({case["image"] for case in CASES}))
def test_example_pictures_are_answered(bundled: tuple[Any, Any], image: str) -> None:
    rows = [case for case in CASES if case["image"] == image]
    assert ask(bundled, rows) == [row["answer"] for row in rows]


def test_held_out_pictures_are_read(bundled: tuple[Any, Any]) -> None:
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row, text in zip(HELD_OUT, ask(bundled, HELD_OUT), strict=True):
        turn = Turn(row["question"], row["answer"], row["metric"])
        part, whole = scoring.tally(turn, text)
        sums[row["suite"]][0] += part
        sums[row["suite"]][1] += whole
    scores = {suite: part / whole for suite, (part, whole) in sums.items()}
    for suite, ceiling in ERROR_CEILING.items():
        assert scores[suite] <= ceiling, scores
    for suite, floor in FLOOR.items():
        assert scores[suite] >= floor, scores


def test_one_at_a_time_is_the_batch(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    rows = [HELD_OUT[0], CASES[0], HELD_OUT[-1], CASES[6]]
    for row, text in zip(rows, ask(bundled, rows), strict=True):
        image = str(ROOT / row["image"])
        alone = opsin.generate(model, processor, row["question"], image=image, max_tokens=512)
        assert alone.text == text


def test_another_picture_is_another_answer(bundled: tuple[Any, Any]) -> None:
    lines = [row for row in HELD_OUT if row["suite"] == "line_cer"]
    rows = [{**row, "question": "Read the text."} for row in lines]
    assert len(set(ask(bundled, rows))) == len(rows)


def test_a_second_turn_about_the_same_picture(bundled: tuple[Any, Any]) -> None:
    model, processor = bundled
    messages = [
        {"role": "user", "content": "What is the total?"},
        {"role": "assistant", "content": "$17.01"},
        {"role": "user", "content": "How much is the tax?"},
    ]
    image = str(ROOT / "docs/images/receipt.png")
    assert opsin.generate(model, processor, messages, image=image).text == "$1.26"


def test_a_located_shape_is_where_it_was_drawn(bundled: tuple[Any, Any]) -> None:
    row = {"image": "docs/images/shapes.png", "question": "Locate the blue square in the image."}
    found = scoring.parse_boxes(ask(bundled, [row])[0])
    width, height = Image.open(ROOT / row["image"]).size
    drawn = (200 / width * 1000, 40 / height * 1000, 280 / width * 1000, 120 / height * 1000)
    assert [label for _, label in found] == ["blue square"]
    assert scoring.overlap(found[0][0], drawn) > 0.75


@pytest.fixture(scope="module")
def reference() -> TransformersEngine:
    """Transformers on the same folder, fp32."""
    return TransformersEngine(str(FOLDER))


def test_pixels_are_transformers(bundled: tuple[Any, Any]) -> None:
    """Opsin's preprocessing, the training code's, and Transformers' PIL image processor."""
    pil = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = pil.Qwen2VLImageProcessorPil.from_pretrained(FOLDER)
    for row in (CASES[0], HELD_OUT[0], HELD_OUT[-1]):
        image = Image.open(ROOT / row["image"]).convert("RGB")
        theirs = processor(images=[image], return_tensors="pt")
        mine, (rows, columns) = preprocess(image)
        assert theirs["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
        torch.testing.assert_close(mine, theirs["pixel_values"].float(), atol=0.02, rtol=0)
        ours = opsin.prepare_inputs(bundled[1], images=[image], prompts="Read the text.")
        flat = ours["pixel_values"].float().reshape(len(mine), -1)
        expected = mine.reshape(len(mine), 3, 2, 256)
        expected = expected.flatten(1) if flat.shape[1] == 1536 else expected[:, :, 0].flatten(1)
        torch.testing.assert_close(flat, expected, atol=0.02, rtol=0)


def test_log_probabilities_are_transformers(
    bundled: tuple[Any, Any], reference: TransformersEngine
) -> None:
    model, processor = bundled
    for row in (CASES[0], HELD_OUT[0], HELD_OUT[-1]):
        image = Image.open(ROOT / row["image"]).convert("RGB")
        patches, (rows, columns) = preprocess(image)
        prompt = reference._prompt(row["question"], [(rows, columns)])
        inputs = opsin.prepare_inputs(processor, images=[image], prompts=row["question"])
        assert inputs["input_ids"][0].tolist() == prompt
        taken = inputs.pop("input_ids"), inputs.pop("pixel_values"), inputs.pop("attention_mask")
        steps = list(opsin.generate_step(taken[0], model, *taken[1:], max_tokens=12, **inputs))
        answer = [token for token, _ in steps]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = reference.model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == reference.image_pad).int(),
                pixel_values=patches,
                image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns]]),
            ).logits[0]
        theirs = logits[len(prompt) - 1 : -1].log_softmax(-1)
        ours = torch.stack([values for _, values in steps]).float()
        assert theirs.argmax(-1).tolist() == answer
        # Only what could be said: far below, rounding in the pixels shows.
        likely = theirs > -12
        assert float((ours - theirs)[likely].abs().max()) < 0.05


def test_greedy_answers_are_transformers(
    bundled: tuple[Any, Any], reference: TransformersEngine
) -> None:
    rows = [CASES[0], CASES[5], HELD_OUT[0], HELD_OUT[-1]]
    images = [[Image.open(ROOT / row["image"])] for row in rows]
    theirs = reference.answer(images, [row["question"] for row in rows], 256)
    assert ask(bundled, rows) == theirs
    assert np.all([len(text) > 0 for text in theirs])
