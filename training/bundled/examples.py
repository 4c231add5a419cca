"""Draws the example pictures of docs/images and the small held-out set of tests/bundled."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from PIL import Image

from training.bundled import fonts, scoring, tasks
from training.bundled.page import Page, Picture, Wear
from training.bundled.paper_tasks import markdown
from training.bundled.shape_tasks import COLOURS, Item, draw_shape

ROOT = Path(__file__).resolve().parents[2]
# How many held-out pictures of each suite the tests keep.
KEPT = {
    "line_cer": 8,
    "paragraph_cer": 3,
    "receipt_total_accuracy": 4,
    "shape_accuracy": 8,
    "shape_box_iou": 3,
    "text_box_iou": 2,
    "table_cell_accuracy": 3,
}


def receipt(face: str) -> Image.Image:
    """docs/images/receipt.png."""
    rows = [
        ("Corner Cafe", ""),
        ("Date: 2026-11-21", "09:42"),
        ("2 x Latte", "$8.40"),
        ("Bagel", "$3.25"),
        ("Orange Juice", "$4.10"),
        ("Subtotal", "$15.75"),
        ("Tax", "$1.26"),
        ("TOTAL", "$17.01"),
        ("Thank you!", ""),
    ]
    size = 22
    page = Page(380, 40 + 34 * len(rows), (252, 250, 244), (30, 30, 35))
    widths = fonts.advances(face, size)
    for index, (left, right) in enumerate(rows):
        top = 20 + 34 * index
        length = sum(widths[char] for char in left)
        page.text(24 if right else (380 - length) / 2, top, left, face, size)
        if right:
            page.text(356 - sum(widths[char] for char in right), top, right, face, size)
    return _finished(page)


def shapes() -> Image.Image:
    """docs/images/shapes.png."""
    page = Page(480, 320, (255, 255, 255), colour=True)
    items = [
        Item("circle", "red", (40, 40, 130, 130)),
        Item("square", "blue", (200, 40, 280, 120)),
        Item("circle", "red", (350, 60, 420, 130)),
        Item("triangle", "green", (60, 190, 170, 290)),
        Item("star", "yellow", (310, 180, 420, 290)),
    ]
    for item in items:
        draw_shape(page, item, COLOURS[item.colour], None)
    return _finished(page)


def table(face: str) -> Image.Image:
    """docs/images/table.png."""
    cells = [
        ["City", "Days", "Price"],
        ["Lisbon", "4", "$310"],
        ["Oslo", "3", "$455"],
        ["Rome", "6", "$520"],
    ]
    size, spans = 22, (130, 90, 110)
    page = Page(370, 40 + 40 * len(cells), (255, 255, 255), (20, 20, 20))
    for row, line in enumerate(cells):
        left = 20
        for span, text in zip(spans, line, strict=True):
            page.text(left + 12, 26 + 40 * row, text, face, size)
            left += span
    for row in range(len(cells) + 1):
        page.draw.line((20, 20 + 40 * row, 350, 20 + 40 * row), fill=200)
    for left in (20, 150, 240, 350):
        page.draw.line((left, 20, left, 20 + 40 * len(cells)), fill=200)
    return _finished(page)


def note(face: str) -> Image.Image:
    """docs/images/note.png."""
    lines = [
        "Meeting on Monday",
        "Bring the green folder",
        "Room 214 at 10:30",
        "Call Anna: 555-0182",
    ]
    page = Page(420, 190, (255, 244, 190), (60, 40, 20))
    for index, line in enumerate(lines):
        page.text(24, 20 + 38 * index, line, face, 26)
    return _finished(page)


def _finished(page: Page) -> Image.Image:
    return page.finish(Wear(), Random(0)).image()


def cases() -> list[dict[str, str]]:
    """Questions about the example pictures, with the answers a reader would give."""
    described = [
        ("receipt.png", "What is the total?", "$17.01"),
        ("receipt.png", "How much is the Bagel?", "$3.25"),
        ("receipt.png", "How much is the tax?", "$1.26"),
        ("receipt.png", "What is the date?", "2026-11-21"),
        ("receipt.png", "Which store is it?", "Corner Cafe"),
        ("shapes.png", "How many circles are there?", "2"),
        ("shapes.png", "How many red circles are there?", "2"),
        ("shapes.png", "How many shapes are there?", "5"),
        ("shapes.png", "How many black squares are there?", "0"),
        ("shapes.png", "What color is the triangle?", "green"),
        ("shapes.png", "Where is the yellow star?", "bottom right"),
        ("shapes.png", "Is there a blue square?", "Yes"),
        ("shapes.png", "Is there a purple oval?", "No"),
        (
            "table.png",
            "Convert the table to Markdown.",
            markdown(
                [
                    ["City", "Days", "Price"],
                    ["Lisbon", "4", "$310"],
                    ["Oslo", "3", "$455"],
                    ["Rome", "6", "$520"],
                ]
            ),
        ),
        (
            "note.png",
            "Read the text.",
            "Meeting on Monday\nBring the green folder\nRoom 214 at 10:30\nCall Anna: 555-0182",
        ),
        ("note.png", "Read the last line.", "Call Anna: 555-0182"),
    ]
    return [
        {"image": f"docs/images/{name}", "question": q, "answer": a} for name, q, a in described
    ]


def write_examples(folder: Path, face: str) -> None:
    """Writes the example pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {"receipt": receipt(face), "shapes": shapes(), "table": table(face), "note": note(face)}
    for name, picture in made.items():
        picture.save(folder / f"{name}.png", optimize=True)


def _lossless(picture: Picture) -> Image.Image:
    """The picture's exact colours, as a palette where it has at most 256."""
    if picture.plane.mode == "RGB":
        return picture.plane
    paletted = picture.plane.copy()
    paletted.putpalette(picture.table().T.tobytes())
    return paletted


def write_held_out(folder: Path) -> None:
    """Writes the first held-out pictures of each suite with their questions and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for suite, count in KEPT.items():
        kind, _ = scoring.SUITES[suite]
        for index in range(count):
            sample = tasks.held_out_sample(kind, index)
            turn = scoring.asked(sample, suite)
            name = f"{suite}_{index}.png"
            _lossless(sample.pictures[0]).save(folder / name, optimize=True)
            rows.append(
                {
                    "image": f"tests/bundled/heldout/{name}",
                    "suite": suite,
                    "metric": turn.metric,
                    "question": turn.question,
                    "answer": turn.answer,
                }
            )
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    (folder / "labels.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("face", help="a font file for the example pictures")
    args = parser.parse_args()
    write_examples(ROOT / "docs" / "images", args.face)
    write_held_out(ROOT / "tests" / "bundled" / "heldout")
    text = json.dumps(cases(), indent=1, ensure_ascii=False)
    (ROOT / "tests" / "bundled" / "cases.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
