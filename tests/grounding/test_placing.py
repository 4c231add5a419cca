"""Synthetic answers land on the right pixel of the original, whatever the family did to it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from opsin.errors import InputError
from opsin.families.base import Family, MediaInput
from opsin.families.qwen2_5_vl import Qwen25VL
from opsin.families.qwen2_vl import Qwen2VL
from opsin.families.qwen3_vl import Qwen3VL
from opsin.grounding import Box, Frame, Grounding, Point, Polygon, extract_points_from_text, parse
from opsin.grounding.parsing import regions_of
from opsin.grounding.patch_points import joined_metadata

SIZES = [(1280, 720), (300, 900), (32, 32), (31, 57), (4000, 3000)]
VISION = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}


class Words:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        text = "".join(map(chr, ids))
        return text.replace("<|box_start|>", "") if skip_special_tokens else text


def processor(family: Family) -> Any:
    return SimpleNamespace(family=family, tokenizer=Words())


def real(family: type[Family]) -> Any:
    config = {"vision_config": VISION}
    return processor(family(config, {"max_pixels": 512 * 512, "min_pixels": 56 * 56}))


def red_box(size: tuple[int, int]) -> tuple[int, int, int, int]:
    width, height = size
    return width // 4, height // 3, width * 3 // 4, height * 2 // 3


def near(region: Any, box: tuple[float, ...], within: tuple[float, float]) -> bool:
    pairs = zip(region.points, (box[:2], box[2:]), strict=True)
    return all(abs(x - u) <= within[0] and abs(y - v) <= within[1] for (x, y), (u, v) in pairs)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_of_the_resized_picture_come_back(size: tuple[int, int]) -> None:
    """A red rectangle, found in what the family makes of the picture, is where it was painted."""
    source = real(Qwen25VL)
    picture = Image.new("RGB", size, "white")
    box = red_box(size)
    picture.paste("red", box)
    seen = source.family.prepare_image(picture, {}).processed_size
    red = np.asarray(picture.resize(seen, Image.Resampling.NEAREST))[:, :, 1] == 0
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    there = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    (found,) = parse(f'[{{"bbox_2d": {there}, "label": "red"}}]', source, size)
    # A pixel of the coarser of the two grids.
    assert near(found, box, (max(1, size[0] / seen[0]), max(1, size[1] / seen[1])))
    assert found.image_size == size
    assert found.label == "red"


@pytest.mark.parametrize("size", SIZES)
def test_thousandths_come_back(size: tuple[int, int]) -> None:
    width, height = size
    box = red_box(size)
    numbers = [round(value * 1000 / side) for value, side in zip(box, size * 2, strict=True)]
    (found,) = parse(f'{{"bbox_2d": {numbers}}}', real(Qwen3VL), size)
    assert near(found, box, (width / 2000 + 1e-6, height / 2000 + 1e-6))
    assert list(found.normalized(1000)) == numbers


def test_tags_are_thousandths_where_json_is_pixels() -> None:
    source, size = real(Qwen2VL), (1000, 400)
    seen = source.family.prepare_image(Image.new("RGB", size), {}).processed_size
    (tagged,) = parse("<|box_start|>(500,500),(750,1000)<|box_end|>", source, size)
    assert tagged.points == ((500, 200), (750, 400))
    (plain,) = parse(f'{{"bbox_2d": [0, 0, {seen[0] // 2}, {seen[1]}]}}', source, size)
    assert plain.points == ((0, 0), (500, 400))


def test_tokens_are_read_with_their_special_tokens() -> None:
    tokens = [ord(c) for c in "<|object_ref_start|>a<|object_ref_end|><|box_start|>(0,0),(500,500)"]
    (found,) = parse(tokens, real(Qwen2VL), (100, 100))
    assert found == Box(0, 0, 50, 50, label="a", image_size=(100, 100))


class Framed(Family):
    """A family that shows a picture in a way that a Frame describes."""

    grounding = (Grounding("json_boxes"),)
    frame = Frame(100, 100)

    def prepare_image(self, image: Image.Image, options: Any) -> MediaInput:
        size = (int(self.frame.width), int(self.frame.height))
        details = {"frame": self.frame}
        return MediaInput("image", {}, "", 1, image.size, size, details=details)


@pytest.mark.parametrize(
    ("size", "canvas", "placed"),
    [
        ((800, 400), (448, 448), (0, 112, 448, 336)),
        ((400, 800), (448, 448), (112, 0, 336, 448)),
        ((30, 20), (64, 96), (2, 28, 62, 68)),
    ],
)
def test_padding_is_taken_off(
    size: tuple[int, int], canvas: tuple[int, int], placed: tuple[int, int, int, int]
) -> None:
    family = Framed({}, {})
    family.frame = Frame.padded(canvas, placed)
    x1, y1, x2, y2 = placed
    middle = [(3 * x1 + x2) / 4, (3 * y1 + y2) / 4, x2, y2]
    whole, part, outside = parse(
        f"[{list(placed)}, {middle}, [0, 0, {canvas[0]}, {canvas[1]}]]", processor(family), size
    )
    assert whole.bounds == pytest.approx((0, 0, *size))
    assert part.bounds == pytest.approx((size[0] / 4, size[1] / 4, *size))
    assert outside.bounds == pytest.approx((0, 0, *size))


def test_a_crop_is_put_back() -> None:
    family = Framed({}, {})
    family.frame = Frame(100, 50, left=0.25, top=0.5, right=0.75, bottom=1.0)
    (found,) = parse('{"point_2d": [50, 25]}', processor(family), (400, 200))
    assert found == Point(200, 150, image_size=(400, 200))


def test_a_region_belongs_to_the_picture_it_names() -> None:
    text = json.dumps([{"bbox_2d": [0, 0, 500, 500], "image_index": index} for index in (1, 7)])
    (found,) = parse(text, real(Qwen3VL), [(100, 100), (60, 40)])
    assert (found.image_index, found.bounds, found.image_size) == (1, (0, 0, 30, 20), (60, 40))


def test_without_pictures_or_grounding_there_are_no_regions() -> None:
    text = '{"bbox_2d": [0, 0, 500, 500]}'
    assert regions_of(text, real(Qwen3VL), []) == []
    assert regions_of(text, processor(Family({}, {})), [MediaInput("image", {}, "", 1)]) == []


def test_shapes_and_their_plain_values() -> None:
    size = (200, 100)
    outline = Polygon(((0, 0), (200, 0), (100, 50)), label="roof", image_size=size)
    assert outline.normalized(1000) == (0, 0, 1000, 0, 500, 500)
    assert outline.bounds == (0, 0, 200, 50)
    assert Point(10.123, 20, text="x", object_id=3).to_dict() == {
        "type": "point",
        "point": [10.12, 20],
        "image_index": 0,
        "text": "x",
        "object_id": 3,
    }
    with pytest.raises(InputError, match="how large"):
        Point(1, 1).normalized()


# Patches of two parts each in a 2 x 4 grid, the second picture a single part.
POOLING = np.array([[0, 1], [2, 3], [4, 5], [6, 7], [8, -1]])
GRIDS = [np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), np.array([[8]])]
METADATA = {
    "token_pooling": POOLING,
    "subpatch_mapping": GRIDS,
    "image_sizes": [(400, 100), (30, 60)],
}


def triple(patch: int, part: int, ninth: int, number: int = 1, space: str = "") -> str:
    """The tokens of a point: 5 patches and the end of the list, 2 parts, 9 ninths."""
    return space.join(f"<POINT_{n}>" for n in (patch, 6 + part, 8 + ninth)) + f"{space}{number}"


def test_patch_tokens_are_points() -> None:
    text = f'<points coords="{triple(1, 1, 4)}{triple(4, 0, 2, 2, " ")}<POINT_5>">cats</points>'
    found = extract_points_from_text(text, METADATA)
    # Part 3: column 3, row 0 of 4 x 2; ninth 4 is its middle, by steps of 0.33.
    assert found[0] == (1, 0, pytest.approx((3 + 0.495) / 4 * 400), pytest.approx(0.495 / 2 * 100))
    # Part 8: all of the second picture; ninth 2 is left column, bottom row.
    assert found[1] == (2, 1, pytest.approx(0.165 * 30), pytest.approx(0.825 * 60))
    assert len(found) == 2


def test_a_model_without_ninths_means_the_middle_of_a_part() -> None:
    found = extract_points_from_text("<POINT_0> <POINT_5> 7", METADATA, False, None)
    assert found == [(7, 0, 50, 25)]


def test_numbers_that_name_no_place_are_left_out() -> None:
    for numbers in ((9, 0, 0), (0, 2, 0), (0, 0, 9), (4, 1, 0), (0, -1, 0)):
        assert extract_points_from_text(triple(*numbers), METADATA) == []


def test_patch_points_of_a_request_use_its_own_pictures() -> None:
    class Pointing(Family):
        grounding = (Grounding("patch_points"),)

    def media(side: int) -> MediaInput:
        metadata = {
            "token_pooling": np.array([[0, 1]]),
            "subpatch_mapping": [np.array([[0, 1]])],
            "image_sizes": [(side, side)],
        }
        return MediaInput("image", {}, "", 1, (side, side), details={"pointing": metadata})

    # Two patches, the end of the list, two parts, nine ninths.
    text = '<points coords="<POINT_1><POINT_4><POINT_9>3">ear</points>'
    (found,) = regions_of(text, processor(Pointing({}, {})), [media(100), media(60)])
    assert (found.label, found.object_id, found.image_index) == ("ear", 3, 1)
    assert found.points[0] == pytest.approx(((1 + 0.495) / 2 * 60, 0.495 * 60))
    assert joined_metadata([]) is None
