"""Boxes, points and polygons on a picture, in pixels of the original."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from opsin.errors import InputError

Pair = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of a picture, with what the model says of it.

    label: what it shows, in the model's words. text: what is written there. category: its kind on
    a page (such as "Table"). image_index: which picture of the prompt, counted from 0. score: from
    0 to 1, where the model gives one. object_id: the number of the object, where objects are
    counted. mask_codes: a segmentation mask's code words, where the model writes those. image_size:
    the original picture's (width, height).
    """

    kind: ClassVar[str] = "region"

    label: str = ""
    text: str = ""
    category: str = ""
    image_index: int = 0
    score: float | None = None
    object_id: int | None = None
    mask_codes: tuple[int, ...] = ()
    image_size: tuple[int, int] | None = None

    @property
    def points(self) -> tuple[Pair, ...]:
        """The corners, as (x, y) pairs."""
        raise NotImplementedError

    def with_points(self, points: tuple[Pair, ...]) -> Self:
        """The same region with other corners."""
        raise NotImplementedError

    def mapped(self, move: Callable[[float, float], Pair]) -> Self:
        """The same region with every corner moved."""
        return self.with_points(tuple(move(x, y) for x, y in self.points))

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """The smallest upright rectangle around it: x1, y1, x2, y2."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def normalized(self, span: int = 1000) -> tuple[int, ...]:
        """The coordinates x, y, x, y, ... as whole numbers, each side of the picture being `span`.

        Raises InputError for a region that does not know its picture's size.
        """
        if self.image_size is None:
            raise InputError("The region does not say how large its picture is", param="image_size")
        width, height = self.image_size
        pairs = [(x * span / width, y * span / height) for x, y in self.points]
        return tuple(round(value) for pair in pairs for value in pair)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the kind, its coordinates in pixels, and what is known of it."""
        shape = [round(value, 2) for pair in self.points for value in pair]
        said = {
            "label": self.label or None,
            "text": self.text or None,
            "category": self.category or None,
            "score": self.score,
            "object_id": self.object_id,
            "mask_codes": list(self.mask_codes) or None,
        }
        known = {name: value for name, value in said.items() if value is not None}
        return {"type": self.kind, self.kind: shape, "image_index": self.image_index, **known}


@dataclass(frozen=True, slots=True)
class Box(Region):
    """An upright rectangle from its upper left to its lower right corner."""

    kind: ClassVar[str] = "box"

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def points(self) -> tuple[Pair, ...]:
        return (self.x1, self.y1), (self.x2, self.y2)

    def with_points(self, points: tuple[Pair, ...]) -> Self:
        (x1, y1), (x2, y2) = points
        return dataclasses.replace(
            self, x1=min(x1, x2), y1=min(y1, y2), x2=max(x1, x2), y2=max(y1, y2)
        )


@dataclass(frozen=True, slots=True)
class Point(Region):
    """One place."""

    kind: ClassVar[str] = "point"

    x: float
    y: float

    @property
    def points(self) -> tuple[Pair, ...]:
        return ((self.x, self.y),)

    def with_points(self, points: tuple[Pair, ...]) -> Self:
        ((x, y),) = points
        return dataclasses.replace(self, x=x, y=y)


@dataclass(frozen=True, slots=True)
class Polygon(Region):
    """A closed outline; `corners` are its (x, y) pairs in order, the first not repeated."""

    kind: ClassVar[str] = "polygon"

    corners: tuple[Pair, ...]

    @property
    def points(self) -> tuple[Pair, ...]:
        return self.corners

    def with_points(self, points: tuple[Pair, ...]) -> Self:
        return dataclasses.replace(self, corners=points)


def shape_of(numbers: tuple[float, ...] | list[float], **said: Any) -> Region | None:
    """The region of a flat list of coordinates: 2 are a point, 4 a box, 6 and more a polygon.

    None for any other count. A box's corners may come in either order.
    """
    count = len(numbers)
    if count == 2:
        return Point(numbers[0], numbers[1], **said)
    if count == 4:
        x1, y1, x2, y2 = numbers
        return Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2), **said)
    if count >= 6 and count % 2 == 0:
        return Polygon(tuple(zip(numbers[::2], numbers[1::2], strict=True)), **said)
    return None
