"""What `opsin ocr` was told to read: files, folders and patterns, each with a name for its text."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from opsin.errors import InputError, NotFoundError

# What a folder is searched for; a file named outright is read whatever it is called.
_PICTURES = "png jpg jpeg webp gif tif tiff bmp avif heic heif jp2 ppm pgm pbm"
ENDINGS = frozenset(f".{ending}" for ending in ("pdf", *_PICTURES.split()))
_WILD = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Source:
    """One document to read. `place` is where its text goes, below the output folder, no ending."""

    path: str
    place: PurePosixPath

    @property
    def state(self) -> tuple[str, int, int]:
        """What tells a changed file from the one read before: its name, bytes and time."""
        if is_url(self.path):
            return self.path, 0, 0
        facts = Path(self.path).stat()
        return str(Path(self.path).resolve()), facts.st_size, facts.st_mtime_ns


def is_url(word: str) -> bool:
    """Whether a word names something to be fetched."""
    return word.startswith(("http://", "https://"))


def find_sources(words: Sequence[str]) -> list[Source]:
    """The documents that words of the command line name, in order, each once.

    A folder stands for the pictures and PDF files in it and below, by name; a pattern (`*`, `**`)
    that the shell left alone for what it matches. Raises NotFoundError for a word that names
    nothing.
    """
    found: dict[str, PurePosixPath] = {}
    for word in words:
        for path, name in _found(word):
            found.setdefault(path, name)
    if not found:
        raise InputError(
            "There is nothing to read",
            why=f"no picture or PDF file is in {', '.join(words)}",
            param="files",
        )
    stems = Counter(str(name.with_suffix("")).lower() for name in found.values())
    sources = []
    taken: set[str] = set()
    for path, name in found.items():
        alone = stems[str(name.with_suffix("")).lower()] == 1
        place = _free(name.with_suffix("") if alone else name, taken)
        sources.append(Source(path, place))
    return sources


def _free(place: PurePosixPath, taken: set[str]) -> PurePosixPath:
    """The place, with a number behind it if an equal name from elsewhere has it already."""
    free, number = place, 1
    while str(free).lower() in taken:
        number += 1
        free = place.with_name(f"{place.name}-{number}")
    taken.add(str(free).lower())
    return free


def _found(word: str) -> list[tuple[str, PurePosixPath]]:
    """Paths that a word stands for, each with its name below what the word named."""
    if is_url(word):
        name = PurePosixPath(urlsplit(word).path).name
        return [(word, PurePosixPath(name or "page"))]
    path = Path(word).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
        return [(str(p), PurePosixPath(p.relative_to(path).as_posix())) for p in files]
    if path.exists():
        return [(str(path), PurePosixPath(path.name))]
    if _WILD & set(word):
        matches = sorted(p for p in _matches(path) if Path(p).is_file())
        if matches:
            return [(p, PurePosixPath(Path(p).name)) for p in matches]
    raise NotFoundError(f"There is no file {word}", remedy="Check the path", param="files")


def parse_pages(text: str | None) -> frozenset[int] | None:
    """Page numbers of `1-3,7`, from 1; None for all."""
    if text is None:
        return None
    wanted: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        known = all(end.isdigit() and 0 < int(end) <= 1_000_000 for end in ends)
        if not known or int(ends[0]) > int(ends[1]):
            raise InputError(
                f"{text!r} names no pages", remedy="Write it like 1-3,7", param="pages"
            )
        wanted.update(range(int(ends[0]), int(ends[1]) + 1))
    return frozenset(wanted)


def page_ranges(numbers: Sequence[int]) -> str:
    """Ascending page numbers in the form that `parse_pages` reads."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _matches(pattern: Path) -> list[str]:
    return glob.glob(str(pattern), recursive=True)  # noqa: PTH207  Path.glob wants a root
