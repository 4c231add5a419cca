"""Draws regions on a picture: outlines and markers in a colour for each label, and labels that can
be read.
"""

from __future__ import annotations

import io
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageFont

from opsin.grounding.regions import Point, Region

Rect = tuple[float, float, float, float]
Colour = tuple[int, int, int]

# Ten hues told apart by most eyes, light and dark ones in turn.
PALETTE: tuple[Colour, ...] = (
    (230, 25, 75),
    (0, 130, 200),
    (255, 200, 0),
    (60, 160, 60),
    (245, 130, 48),
    (145, 30, 180),
    (70, 220, 230),
    (240, 50, 230),
    (170, 110, 40),
    (128, 128, 0),
)
DARK, LIGHT = (0, 0, 0), (255, 255, 255)
# A picture smaller than this is drawn enlarged: on fewer pixels no label can be read.
SMALLEST = 320
LONGEST_LABEL = 48


def draw(
    image: Image.Image,
    regions: Sequence[Region],
    *,
    labels: bool = True,
    font: str | None = None,
) -> Image.Image:
    """A copy of the picture (RGB) with the regions drawn on it.

    Pictures under 320 pixels are enlarged by a whole factor first. `font` is a TrueType file, for
    labels in scripts that Pillow's built-in font lacks. The same input gives the same picture.
    """
    factor = max(1, math.ceil(SMALLEST / max(image.size)))
    canvas = image.convert("RGB")
    if factor > 1:
        size = (image.width * factor, image.height * factor)
        canvas = canvas.resize(size, Image.Resampling.NEAREST)
    pen = _Pen(canvas, font)
    scaled = [region.mapped(lambda x, y: (x * factor, y * factor)) for region in regions]
    colours = colours_of(regions)
    for region, colour in zip(scaled, colours, strict=True):
        pen.outline(region, colour)
    if labels:
        for region, colour in zip(scaled, colours, strict=True):
            pen.label(region, colour)
    return canvas


def draw_all(pictures: Sequence[Image.Image], regions: Sequence[Region]) -> list[Image.Image]:
    """Those pictures of a prompt that have regions, each with its own drawn on it."""
    return [
        draw(picture, own)
        for index, picture in enumerate(pictures)
        if (own := [region for region in regions if region.image_index == index])
    ]


def as_png(pictures: Sequence[Image.Image], widest: int = 1600) -> bytes:
    """Pictures one below the other as a PNG file, none wider or higher than `widest` pixels."""
    copies = [picture.copy() for picture in pictures]
    for picture in copies:
        picture.thumbnail((widest, widest))
    size = (max(picture.width for picture in copies), sum(picture.height for picture in copies))
    sheet = Image.new("RGB", size, LIGHT)
    top = 0
    for picture in copies:
        sheet.paste(picture, (0, top))
        top += picture.height
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def caption(region: Region) -> str:
    """What is written beside a region: its label, kind or text, cut to a length that fits."""
    said = region.label or region.category or region.text
    if region.object_id is not None:
        said = f"{region.object_id} {said}"
    if region.score is not None:
        said = f"{said} {region.score:.2f}"
    shown = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in said[:1000])
    return shortened(" ".join(shown.split()), LONGEST_LABEL)


def shortened(text: str, length: int) -> str:
    """Text of at most so many characters, with a sign that something was cut."""
    return text if len(text) <= length else text[: max(length - 3, 0)].rstrip() + "..."


def colours_of(regions: Sequence[Region]) -> list[Colour]:
    """One colour for each region: the same for the same label, in the order of appearance."""
    order: dict[str, int] = {}
    for region in regions:
        order.setdefault(region.label or region.category, len(order))
    return [PALETTE[order[r.label or r.category] % len(PALETTE)] for r in regions]


def contrast(colour: Colour) -> Colour:
    """Black or white, whichever is read better on a colour (WCAG 2 relative luminance)."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in colour)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return DARK if luminance > 0.18 else LIGHT


@dataclass(slots=True)
class _Placed:
    """Rectangles that are taken, in cells so that a look-up does not go through all of them."""

    cell: float
    cells: defaultdict[tuple[int, int], list[Rect]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def _cells_of(self, rect: Rect) -> Iterator[tuple[int, int]]:
        x1, y1, x2, y2 = (int(value // self.cell) for value in rect)
        return ((x, y) for x in range(x1, x2 + 1) for y in range(y1, y2 + 1))

    def add(self, rect: Rect) -> None:
        for cell in self._cells_of(rect):
            self.cells[cell].append(rect)

    def overlap(self, rect: Rect) -> float:
        """The area of a rectangle that others cover, each counted by itself."""
        others = {other for cell in self._cells_of(rect) for other in self.cells.get(cell, ())}
        return sum(common_area(rect, other) for other in others)


def common_area(one: Rect, other: Rect) -> float:
    """The area that two rectangles share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(wide, 0.0) * max(high, 0.0)


class _Pen:
    """Draws on one picture with sizes that suit it, and keeps labels apart."""

    def __init__(self, canvas: Image.Image, font: str | None) -> None:
        self.width, self.height = canvas.size
        self.draw = ImageDraw.Draw(canvas)
        longest = max(canvas.size)
        self.line = max(2, round(longest / 400))
        self.radius = max(4, round(longest / 110))
        height = max(11, min(round(longest / 45), min(canvas.size) // 3))
        self.font = (
            ImageFont.truetype(font, height) if font else ImageFont.load_default(float(height))
        )
        self.padding = max(2, height // 6)
        self.placed = _Placed(cell=height * 4.0)

    def outline(self, region: Region, colour: Colour) -> None:
        """The region itself, with a dark rim so that it shows on any ground."""
        for tint, extra in ((DARK, 2), (colour, 0)):
            if isinstance(region, Point):
                self._marker(region.x, region.y, tint, extra)
            elif len(region.points) == 2:
                self._box(region.bounds, tint, extra)
            else:
                corners = [*region.points, region.points[0]]
                self.draw.line(corners, fill=tint, width=self.line + extra, joint="curve")

    def _box(self, bounds: Rect, tint: Colour, extra: int) -> None:
        half = extra // 2
        x1, y1, x2, y2 = (round(value) for value in bounds)
        # The line lies inside the box, and inside the picture when the box ends at its border.
        x2, y2 = max(x2 - 1, x1), max(y2 - 1, y1)
        rim = (x1 - half, y1 - half, x2 + half, y2 + half)
        self.draw.rectangle(rim, outline=tint, width=self.line + extra)

    def _marker(self, x: float, y: float, tint: Colour, extra: int) -> None:
        around = self.radius + extra
        disc = (x - around, y - around, x + around, y + around)
        self.draw.ellipse(disc, fill=tint)
        if extra:
            self.placed.add(disc)  # labels keep off every marker
            return
        core = max(1, self.radius // 3)
        self.draw.ellipse((x - core, y - core, x + core, y + core), fill=contrast(tint))

    def label(self, region: Region, colour: Colour) -> None:
        """The region's caption on its colour, where it covers the least."""
        text = self._fitting(caption(region))
        if not text:
            return
        left, top, right, bottom = self.draw.textbbox((0, 0), text, font=self.font)
        wide, high = right - left + 2 * self.padding, bottom - top + 2 * self.padding
        rect = self._free_place(region, wide, high)
        self.placed.add(rect)
        self.draw.rectangle(rect, fill=colour, outline=DARK)
        at = (rect[0] + self.padding - left, rect[1] + self.padding - top)
        self.draw.text(at, text, fill=contrast(colour), font=self.font)

    def _fitting(self, text: str) -> str:
        """Text cut to the width of the picture."""
        room = self.width - 2 * self.padding - 2
        while text and self.draw.textlength(text, font=self.font) > room:
            text = shortened(text, len(text) - 1) if len(text) > 4 else text[:-1]
        return text

    def _free_place(self, region: Region, wide: float, high: float) -> Rect:
        """The first place around the region that lies in the picture and covers no other label,
        else the one that covers the least.
        """
        best: tuple[float, Rect] | None = None
        for x, y in self._places(region, wide, high):
            x = min(max(x, 0.0), max(self.width - wide - 1, 0.0))
            y = min(max(y, 0.0), max(self.height - high - 1, 0.0))
            rect = (x, y, x + wide, y + high)
            covered = self.placed.overlap(rect)
            if covered == 0:
                return rect
            if best is None or covered < best[0]:
                best = (covered, rect)
        assert best is not None
        return best[1]

    def _places(self, region: Region, wide: float, high: float) -> Iterator[tuple[float, float]]:
        """Upper left corners of a label, the best first: above, below, inside, at the sides."""
        x1, y1, x2, y2 = region.bounds
        if isinstance(region, Point):
            gap = self.radius + 3
            x1, y1, x2, y2 = x1 - gap, y1 - gap, x2 + gap, y2 + gap
            middle = (y1 + y2 - high) / 2
            yield x2, middle
            yield x1 - wide - 1, middle
        above, below = y1 - high, y2
        if above >= 0:
            yield x1, above
        if below + high < self.height:
            yield x1, below
        yield x1, y1
        yield x2 - wide, above
        yield x2 - wide, below
        yield x2 - wide, y1
        yield x1, y2 - high
        yield x2, y1
        yield x1 - wide, y1
        for step in range(1, 6):
            yield x1, y1 + step * high
            yield x1, above - step * high
