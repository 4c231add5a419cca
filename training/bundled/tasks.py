"""The mixture of tasks, and a sample by its seed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from training.bundled import paper_tasks, shape_tasks, text_tasks
from training.bundled.sample import Sample

MAKERS: dict[str, Callable[[Random, str], Sample]] = {
    "line": text_tasks.line_sample,
    "paragraph": text_tasks.paragraph_sample,
    "receipt": paper_tasks.receipt_sample,
    "table": paper_tasks.table_sample,
    "chart": paper_tasks.chart_sample,
    "locate_text": text_tasks.locate_text_sample,
    "shapes": shape_tasks.shapes_sample,
    "locate_shape": shape_tasks.locate_shape_sample,
    "several": shape_tasks.several_sample,
    "talk": shape_tasks.talk_sample,
}
# Shares of a training batch.
SHARES = {
    "line": 0.15,
    "paragraph": 0.15,
    "receipt": 0.1,
    "table": 0.08,
    "chart": 0.03,
    "locate_text": 0.16,
    "shapes": 0.23,
    "locate_shape": 0.05,
    "several": 0.04,
    "talk": 0.02,
}
SYSTEM = ("You are a helpful assistant.", "Answer briefly.", "You read images.")


def training_sample(rng: Random) -> Sample:
    """A sample of the mixture."""
    kind = rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
    sample = MAKERS[kind](rng, "train")
    if rng.random() < 0.08:
        sample.system = rng.choice(SYSTEM)
    sample.pictures_last = rng.random() < 0.06
    return sample


def held_out_sample(kind: str, index: int, seed: int = 2026) -> Sample:
    """The index-th held-out sample of a kind: the same on every machine with the same fonts."""
    return MAKERS[kind](Random(f"{seed}/{kind}/{index}"), "heldout")
