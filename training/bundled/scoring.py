"""Scores of answers: character error rate, exact answers, box overlap, table cells."""

from __future__ import annotations

import json
import re

from training.bundled.sample import Sample, Turn

Box = tuple[float, float, float, float]
# What is measured: name -> (kind of held-out sample, turn asked, share of the sample count).
SUITES: dict[str, tuple[str, int]] = {
    "line_cer": ("line", 0),
    "paragraph_cer": ("paragraph", 0),
    "receipt_cer": ("receipt", 1),
    "receipt_total_accuracy": ("receipt", 0),
    "shape_accuracy": ("shapes", 0),
    "shape_box_iou": ("locate_shape", 0),
    "text_box_iou": ("locate_text", 0),
    "table_cell_accuracy": ("table", 0),
}
TARGETS = {
    "line_cer": 0.015,
    "paragraph_cer": 0.04,
    "receipt_cer": 0.04,
    "receipt_total_accuracy": 0.9,
    "shape_accuracy": 0.97,
    "shape_box_iou": 0.8,
    "text_box_iou": 0.8,
    "table_cell_accuracy": 0.85,
}


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance in characters."""
    previous = list(range(len(other) + 1))
    for row, char in enumerate(one, start=1):
        current = [row]
        for column, mate in enumerate(other, start=1):
            substituted = previous[column - 1] + (char != mate)
            current.append(min(previous[column] + 1, current[-1] + 1, substituted))
        previous = current
    return previous[-1]


def plain(text: str) -> str:
    """Text without case-preserving changes: outer space and runs of spaces only."""
    return re.sub(r"[ \t]+", " ", text).strip()


def parse_boxes(text: str) -> list[tuple[Box, str]]:
    """Boxes of an answer in the family's JSON; an unreadable answer has none."""
    body = text.strip().removeprefix("```json").removesuffix("```")
    try:
        rows = json.loads(body)
        return [(tuple(map(float, row["bbox_2d"])), str(row.get("label", ""))) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    tall = min(one[3], other[3]) - max(one[1], other[1])
    if wide <= 0 or tall <= 0:
        return 0.0
    shared = wide * tall
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared)


def box_score(answer: str, truth: str) -> float:
    """Mean overlap of each true box with the answer's box of the same rank; extra boxes cost."""
    found, wanted = parse_boxes(answer), parse_boxes(truth)
    if not wanted:
        return float(not found)
    total = sum(max((overlap(box, true) for box, _ in found), default=0.0) for true, _ in wanted)
    return total / max(len(wanted), len(found))


def table_score(answer: str, truth: str) -> tuple[int, int]:
    """Right cells and all cells of a Markdown table."""
    got, wanted = _cells(answer), _cells(truth)
    right = 0
    for row, cells in enumerate(wanted):
        for column, cell in enumerate(cells):
            if row < len(got) and column < len(got[row]) and got[row][column] == cell:
                right += 1
    return right, sum(len(cells) for cells in wanted)


def _cells(text: str) -> list[list[str]]:
    rows = [line.strip().strip("|").split("|") for line in text.strip().split("\n")]
    cells = [[plain(cell) for cell in row] for row in rows]
    return [row for row in cells if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]


def tally(turn: Turn, answer: str) -> tuple[float, float]:
    """What an answer adds to its suite: a numerator and a denominator."""
    if turn.metric == "cer":
        truth = plain(turn.answer)
        return float(edit_distance(plain(answer), truth)), float(len(truth))
    if turn.metric == "iou":
        return box_score(answer, turn.answer), 1.0
    if turn.metric == "table":
        right, total = table_score(answer, turn.answer)
        return float(right), float(total)
    return float(plain(answer).rstrip(".").lower() == plain(turn.answer).lower()), 1.0


def asked(sample: Sample, suite: str) -> Turn:
    """The turn of a held-out sample that a suite asks."""
    return sample.turns[SUITES[suite][1]]
