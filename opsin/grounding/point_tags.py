"""Points in tags, in percent of the picture: `<point x="10.5" y="20" alt="cat">cat</point>`.

Also `<points x1= y1= x2= y2= ...>`, and the newer `coords="IMAGE ID X Y ID X Y; ..."`, whose
thousandths are turned into percent.
"""

from __future__ import annotations

import re

from opsin.grounding.regions import Point, Region

_TAG = re.compile(r"<(/?)points?\b([^<>]*)>?", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"(?<!\w)(\w++)\s*+=\s*+(?:\"([^\"]*+)\"?|'([^']*+)'?)")
_NUMBER = re.compile(r"[0-9]{1,12}(?:\.[0-9]{0,12})?")
_NAME = re.compile(r"([xy])([0-9]{0,6})", re.IGNORECASE)


def parse(text: str) -> list[Region]:
    """The points of a text, each side of the picture being 100."""
    found: list[Region] = []
    tags = list(_TAG.finditer(text))
    for i, tag in enumerate(tags):
        if tag[1]:
            continue
        closed = i + 1 < len(tags) and tags[i + 1][1] == "/"
        inside = text[tag.end() : tags[i + 1].start()].strip() if closed else ""
        attributes = {m[1].lower(): m[2] or m[3] or "" for m in _ATTRIBUTE.finditer(tag[2])}
        label = inside or attributes.get("alt", "").strip()
        found += coordinate_list(attributes.get("coords", ""), label)
        found += numbered(attributes, label)
    return found


def numbered(attributes: dict[str, str], label: str) -> list[Region]:
    """Points from x and y, or x1, y1, x2, y2, ...; a half without its other is left out."""
    halves: dict[str, dict[str, float]] = {}
    for name, value in attributes.items():
        axis, number = _NAME.fullmatch(name), _NUMBER.fullmatch(value.strip())
        if axis and number:
            halves.setdefault(axis[2], {})[axis[1].lower()] = float(number[0])
    return [
        Point(half["x"], half["y"], label=label, object_id=int(name) if name else None)
        for name, half in halves.items()
        if len(half) == 2
    ]


def coordinate_list(text: str, label: str) -> list[Region]:
    """Points of a `coords` attribute: for each picture its number, then id, x and y in turn."""
    found: list[Region] = []
    for chunk in re.split(r"[;\t]", text):
        numbers = [float(number) for number in _NUMBER.findall(chunk)]
        for i in range(1, len(numbers) - 2, 3):
            name, x, y = numbers[i : i + 3]
            index = max(int(numbers[0]) - 1, 0)
            found.append(Point(x / 10, y / 10, label=label, object_id=int(name), image_index=index))
    return found
