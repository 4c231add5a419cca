"""Drawn regions can be seen and their labels read, on pictures of any size."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from opsin.grounding import Box, Point, Polygon, Region, draw, draw_points_on_image
from opsin.grounding.drawing import (
    PALETTE,
    SMALLEST,
    _Pen,
    as_png,
    caption,
    common_area,
    contrast,
    draw_all,
)

SIZES = [(900, 500), (420, 900), (32, 32), (3000, 2000), (2000, 40), (1, 1)]


def regions(width: int, height: int) -> list[Region]:
    return [
        Box(0, 0, width * 0.3, height * 0.3, label="cat"),
        Box(width * 0.5, height * 0.4, width, height, label="a label that is far too long " * 4),
        Box(width * 0.55, height * 0.45, width * 0.9, height * 0.9, label="dog", score=0.875),
        Point(width * 0.2, height * 0.7, label="nose", object_id=1),
        Point(width, 0, label="edge"),
        Polygon(((width * 0.4, 0), (width * 0.7, 1), (width * 0.5, height * 0.2)), label="roof"),
        Box(width * 0.1, height * 0.9, width * 0.4, height, category="Footnote"),
    ]


@pytest.mark.parametrize("size", SIZES)
def test_any_size_is_drawn_and_the_picture_is_left_alone(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, "gray")
    before = picture.tobytes()
    drawn = draw(picture, regions(*size))
    assert picture.tobytes() == before
    assert drawn.tobytes() == draw(picture, regions(*size)).tobytes()
    factor = drawn.width // size[0]
    assert drawn.size == (size[0] * factor, size[1] * factor)
    assert max(drawn.size) >= min(SMALLEST, max(drawn.size))
    assert factor == 1 or max(size) < SMALLEST


@pytest.mark.parametrize("size", [(900, 500), (420, 900), (32, 32), (3000, 2000)])
def test_labels_lie_inside_and_apart(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rects = []
    free_place = _Pen._free_place
    monkeypatch.setattr(
        _Pen, "_free_place", lambda *args: rects.append(free_place(*args)) or rects[-1]
    )
    drawn = draw(Image.new("RGB", size, "gray"), regions(*size))
    assert len(rects) == 7
    for i, rect in enumerate(rects):
        assert 0 <= rect[0] < rect[2] <= drawn.width
        assert 0 <= rect[1] < rect[3] <= drawn.height
        assert all(common_area(rect, other) == 0 for other in rects[:i])
        assert rect[3] - rect[1] >= 11


def test_a_box_is_drawn_on_its_pixels_in_the_colour_of_its_label() -> None:
    picture = Image.new("RGB", (400, 400), "white")
    boxes = [
        Box(50, 60, 150, 160, label="a"),
        Box(200, 60, 300, 160, label="b"),
        Box(50, 260, 150, 360, label="a"),
    ]
    drawn = draw(picture, boxes, labels=False)
    assert drawn.getpixel((50, 110)) == drawn.getpixel((149, 110)) == PALETTE[0]
    assert drawn.getpixel((250, 60)) == PALETTE[1]
    assert drawn.getpixel((50, 300)) == PALETTE[0]
    for outside in ((45, 110), (155, 110), (100, 55), (100, 110)):
        assert drawn.getpixel(outside) == (255, 255, 255)


def test_a_small_picture_is_enlarged_so_that_labels_can_be_read() -> None:
    drawn = draw(Image.new("RGB", (32, 16), "white"), [Box(8, 4, 24, 12)], labels=False)
    assert drawn.size == (320, 160)
    assert drawn.getpixel((80, 80)) == PALETTE[0]
    assert drawn.getpixel((160, 80)) == (255, 255, 255)


def test_a_point_is_a_disc_around_its_place() -> None:
    drawn = draw(Image.new("RGB", (400, 400), "white"), [Point(100, 200, label="x")])
    assert drawn.getpixel((100, 200)) == contrast(PALETTE[0])
    assert drawn.getpixel((103, 200)) == PALETTE[0]


def test_text_contrasts_with_every_colour() -> None:
    def luminance(colour: tuple[int, int, int]) -> float:
        parts = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in PALETTE:
        light, dark = sorted((luminance(colour), luminance(contrast(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, colour


def test_captions_are_one_short_line() -> None:
    assert caption(Box(0, 0, 1, 1, label="a\nb\t\x00c \ud800")) == "a b c"
    assert caption(Box(0, 0, 1, 1, category="Table", text="x")) == "Table"
    assert caption(Box(0, 0, 1, 1, label="dog", score=0.875)) == "dog 0.88"
    assert caption(Point(0, 0, object_id=3)) == "3"
    assert len(caption(Box(0, 0, 1, 1, text="long " * 9999))) <= 48


def test_every_picture_of_a_prompt_gets_its_own_regions() -> None:
    pictures = [Image.new("RGB", (400 + 10 * i, 400), "white") for i in range(3)]
    found = [Box(0, 0, 9, 9, image_index=0), Box(0, 0, 9, 9, image_index=2)]
    drawn = draw_all(pictures, found)
    assert [picture.width for picture in drawn] == [400, 420]
    sheet = Image.open(io.BytesIO(as_png(drawn)))
    assert sheet.size == (420, 800)
    assert Image.open(io.BytesIO(as_png([Image.new("RGB", (5000, 2500))]))).size == (1600, 800)


def test_points_are_drawn_on_a_file(tmp_path) -> None:
    Image.new("L", (400, 400), "white").save(tmp_path / "in.png")
    out = tmp_path / "out.png"
    drawn = draw_points_on_image(tmp_path / "in.png", [(1, 0, 100.0, 200.0)], out)
    assert drawn.getpixel((103, 200)) == PALETTE[0]
    assert Image.open(out).tobytes() == drawn.tobytes()
