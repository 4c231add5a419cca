"""Slices of a nested model (MatFormer, arXiv:2310.07707): tables of them, as they are published."""

from __future__ import annotations

import csv
import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from opsin.errors import InputError

NAME, LAYERS, PARAMETERS = "name", "# Layers", "# Effective Params (B)"
WIDTHS, SKIPPED = "FFN Hidden Dims", "Layers Skipped"
NUMBER = re.compile(r"\s*(\d[\d_]*)\s*(?:\*\s*(\d[\d_]*)\s*)?")
MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Slice:
    """A smaller model within a larger one.

    `widths` are the inner widths of the feed-forward blocks of the layers that are kept, `skipped`
    the layers that are not, by their numbers in the whole model; `parameters` are billions.
    """

    name: str
    widths: tuple[int, ...]
    skipped: frozenset[int]
    parameters: float

    def kept(self, layers: int) -> list[int]:
        """The layers that are kept of a model of so many.

        Raises InputError if the slice is one of another model.
        """
        kept = [i for i in range(layers) if i not in self.skipped]
        if len(kept) + len(self.skipped) != layers or len(kept) != len(self.widths):
            raise InputError(
                f"The slice {self.name!r} does not fit this model",
                why=f"it names {len(self.widths)} layers and skips {len(self.skipped)}, "
                f"but the model has {layers}",
                remedy="Slices are cut from the largest model of the family",
                param="matformer_slice",
            )
        return kept


def read_slices(path: Path) -> dict[str, Slice]:
    """The slices of a CSV file, by name.

    Its columns are "name", "# Layers", "# Effective Params (B)", "FFN Hidden Dims" and "Layers
    Skipped"; others are not read. Raises InputError naming the file and the row that is wrong.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read(MAX_BYTES + 1)
        rows = list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise _unreadable(path, type(error).__name__) from None
    if len(text) > MAX_BYTES or not rows:
        raise _unreadable(path, "it is too long" if rows else "there is no row in it")
    found = {}
    for number, row in enumerate(rows, 2):
        try:
            made = _slice(row)
        except (KeyError, ValueError) as error:
            why = f"row {number} has no {error}" if isinstance(error, KeyError) else ""
            raise _unreadable(path, why or f"row {number}: {error}") from None
        found[made.name] = made
    return found


def find_slice(path: Path, name: str) -> Slice:
    """The slice of that name in a file; raises InputError with the names there are."""
    slices = read_slices(path)
    if name not in slices:
        close = difflib.get_close_matches(name, slices, n=3)
        raise InputError(
            f"There is no slice {name!r}",
            why=f"{path.name} has {', '.join(repr(known) for known in slices)}",
            remedy=f"Did you mean {close[0]!r}?" if close else "Use one of these names",
            param="matformer_slice",
        )
    return slices[name]


def _slice(row: dict[str, str | None]) -> Slice:
    """The slice of a row, in which cells at the end may be left out."""
    widths = _numbers(row[WIDTHS] or "")
    skipped = _numbers(row[SKIPPED] or "")
    if len(widths) != int(row[LAYERS] or 0):
        raise ValueError(f"{len(widths)} widths for {row[LAYERS]} layers")
    if not all(widths) or len(set(skipped)) != len(skipped):
        raise ValueError("a width is zero, or a layer is skipped twice")
    return Slice(row[NAME] or "", widths, frozenset(skipped), float(row[PARAMETERS] or 0))


def _numbers(text: str) -> tuple[int, ...]:
    """A list such as "[2_048 * 4, 8192]" or "[]"; products are multiplied out."""
    inside = text.strip().removeprefix("[").removesuffix("]").strip()
    found = []
    for part in inside.split(",") if inside else []:
        match = NUMBER.fullmatch(part)
        if match is None:
            raise ValueError(f"{part.strip()[:40]!r} is no number")
        found.append(int(match[1]) * int(match[2] or 1))
    return tuple(found)


def _unreadable(path: Path, why: str) -> InputError:
    return InputError(
        f"The slices in {path.name} cannot be read",
        why=why,
        remedy=f"Write a CSV file with the columns {', '.join((NAME, LAYERS, WIDTHS, SKIPPED))}",
        param="matformer_config",
    )
