"""Finds free Latin fonts on this machine and splits them into training and held-out families."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

FONT_DIRECTORIES = ("/usr/share/fonts", "/usr/local/share/fonts")
# No face of these families is ever used for training.
HELD_OUT_FAMILIES = (
    "lato",
    "carlito",
    "caladea",
    "inconsolata",
    "vollkorn",
    "karla",
    "b612",
    "b612 mono",
    "clear sans",
    "quattrocento",
    "gentium",
    "gentium basic",
    "fira code",
    "cabin",
    "play",
    "stix",
    "stixgeneral",
    "rubik",
    "verana",
    "gillius adf",
    "courier prime",
)
PLAIN_STYLES = ("regular", "book", "roman", "medium", "normal")
PILLOW_FACE = "pillow-default"
INDEX = "index.json"
# Faces that draw small capitals for lower case, symbols, or letters a person cannot read at 16 px.
_EXCLUDED = (
    "hairline",
    "thin",
    "ultralight",
    "extralight",
    "outline",
    "sketch",
    "brk",
    "symbol",
    "keyboard",
    "smallcaps",
    " sc",
    "caps",
    "script",
    "titling",
    "isabella",
    "kristi",
    "z003",
    "chancery",
    "domestic",
    "wargames",
    "penguin",
    "breip",
    "rufscript",
    "caliban",
    "humor",
    "junkyard",
    "elsewhere",
    "spleen 6x12",
    "euphoric",
    "cupola",
    "spartan",
    "dings",
    "d050000l",
)
_PRINTABLE = "".join(chr(code) for code in range(33, 127))


def held_out_family(family: str) -> bool:
    """Whether the family (any case) belongs to the held-out set."""
    name = family.lower()
    return any(name == held or name.startswith(held + " ") for held in HELD_OUT_FAMILIES)


def _usable(path: Path) -> str | None:
    """The family of a font file that draws every printable ASCII character, else None."""
    try:
        font = ImageFont.truetype(str(path), 24)
    except OSError:
        return None
    family, style = font.getname()
    if family is None or any(word in f"{family} {style}".lower() for word in _EXCLUDED):
        return None
    shapes = set()
    for char in _PRINTABLE:
        mask = font.getmask(char)
        if mask.getbbox() is None:
            return None
        shapes.add((bytes(mask), mask.size))
    if len(shapes) < 90:
        return None
    return family


def scan(directories: tuple[str, ...] = FONT_DIRECTORIES) -> dict[str, list[Path]]:
    """Usable font files by family, names sorted so that every machine sees one order.

    A folder that collect() made has an index, which is believed instead of trying every file.
    """
    found: dict[str, list[Path]] = {}
    for directory in directories:
        index = Path(directory) / INDEX
        if index.exists():
            for family, names in json.loads(index.read_text()).items():
                found.setdefault(family, []).extend(Path(directory) / name for name in names)
            continue
        for path in sorted(Path(directory).rglob("*")):
            if path.suffix.lower() not in (".ttf", ".otf") or path.is_symlink():
                continue
            family = _usable(path)
            if family is not None:
                found.setdefault(family, []).append(path)
    return dict(sorted(found.items()))


@lru_cache(maxsize=1)
def font_directory() -> tuple[str, ...]:
    """Where fonts are looked for: OPSIN_FONTS (a folder) or the system's folders."""
    chosen = os.environ.get("OPSIN_FONTS")
    return (chosen,) if chosen else FONT_DIRECTORIES


@lru_cache(maxsize=4)
def faces(split: str) -> tuple[str, ...]:
    """Font files of a split ('train' or 'heldout'), one entry a face."""
    chosen: list[str] = [PILLOW_FACE] if split == "train" else []
    for family, paths in scan(font_directory()).items():
        if held_out_family(family) == (split == "heldout"):
            chosen.extend(str(path) for path in paths)
    if not chosen:
        raise RuntimeError(f"no {split} fonts found in {font_directory()}: see README.md's list")
    return tuple(chosen)


@lru_cache(maxsize=6000)
def load(face: str, size: int) -> ImageFont.FreeTypeFont:
    """A font at a pixel size; basic layout, which is fast and needs no shaping library."""
    if face == PILLOW_FACE:
        return ImageFont.load_default(size)
    return ImageFont.truetype(face, size, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=6000)
def advances(face: str, size: int) -> dict[str, float]:
    """Advance width in pixels of each printable ASCII character and the space."""
    font = load(face, size)
    return {char: font.getlength(char) for char in " " + _PRINTABLE}


def _rank(path: Path) -> tuple[int, str]:
    stem = path.stem.lower()
    if any(stem.endswith(style) for style in PLAIN_STYLES) or "-" not in stem:
        return (0, stem)
    if stem.endswith(("bold", "-b")):
        return (1, stem)
    if stem.endswith(("italic", "oblique", "it", "-i")) and "bold" not in stem:
        return (2, stem)
    return (3, stem)


def collect(source: str, destination: str, per_family: int, max_bytes: int) -> int:
    """Copies up to per_family faces of each family into one folder; returns the count."""
    target = Path(destination)
    target.mkdir(parents=True, exist_ok=True)
    index: dict[str, list[str]] = {}
    for family, paths in scan((source,)).items():
        fitting = [path for path in paths if path.stat().st_size <= max_bytes]
        for path in sorted(fitting, key=_rank)[:per_family]:
            shutil.copyfile(path, target / path.name)
            index.setdefault(family, []).append(path.name)
    (target / INDEX).write_text(json.dumps(index) + "\n")
    return sum(map(len, index.values()))


def main() -> None:
    """Command line: copy a selection of fonts into one folder."""
    parser = argparse.ArgumentParser(description=collect.__doc__)
    parser.add_argument("source")
    parser.add_argument("destination")
    parser.add_argument("--per-family", type=int, default=3)
    parser.add_argument("--max-bytes", type=int, default=400_000)
    args = parser.parse_args()
    print(collect(args.source, args.destination, args.per_family, args.max_bytes), "faces")


if __name__ == "__main__":
    main()
