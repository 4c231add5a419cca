"""What models write, well formed and not, and the regions in it."""

from __future__ import annotations

import json

import pytest

from opsin.grounding.layout import Layout
from opsin.grounding.regions import Box, Point, Polygon, Region
from opsin.grounding.syntax import SYNTAXES

CAT = Box(1, 2, 30, 40, label="cat")
SEGMENTS = "".join(f"<seg{i:03d}>" for i in range(16))

CASES: dict[str, list[tuple[str, list[Region]]]] = {
    "json_boxes": [
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]', [CAT]),
        ('```json\n[\n\t{"bbox_2d": [1, 2, 30, 40], "label": "cat"}\n]\n```', [CAT]),
        ('{"bbox_2d": [1, 2, 30, 40], "label": "cat"}', [CAT]),
        ('Here it is [as asked]: {"bbox_2d": [1, 2, 30, 40], "label": "cat"}. Fine?', [CAT]),
        ('A 5" cat: [{"bbox_2d" : [ 1 ,2, 30,40 ] ,"label":"cat",},]', [CAT]),
        ("[{'bbox_2d': (1, 2, 30, 40), 'label': 'cat'}]", [CAT]),
        ('{{"bbox_2d": [1, 2, 30, 40], "label": "cat"}}', [CAT]),
        ('{"bbox_2d": [30, 40, 1, 2], "label": "cat"}', [CAT]),
        ('{"bbox_2d": [1, 2, 30, 40, "label": "cat"}', [CAT]),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "cat"]', [CAT]),
        ('{"bbox_2d": ["1", "2", "30", "40"], "label": "cat"}', [CAT]),
        ('{"bbox_2d": "[1, 2, 30, 40]", "label": "cat"}', [CAT]),
        ('{"x1": 1, "y1": 2, "x2": 30, "y2": 40, "label": "cat"}', [CAT]),
        ('{"box": {"left": 1, "top": 2, "right": 30, "bottom": 40}, "name": "cat"}', [CAT]),
        ('{"objects": {"all": [{"bbox": [1, 2, 30, 40], "label": "cat"}]}}', [CAT]),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, {"bbox_2d": [1, 2, 3', [CAT]),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, {"bbox_2d": [1, 2, 3, 4', [CAT]),
        ('[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, {"bbox_2d": [5, 6], "la', [CAT]),
        ('{"bbox_2d": [1, 2, 30, 40], "label": "ca', [Box(1, 2, 30, 40, label="ca")]),
        (
            '{"bbox_2d": [1, 2, 30, 40], "label": "the "big" cat"}',
            [Box(1, 2, 30, 40, label='the "big" cat')],
        ),
        (
            '{"bbox_2d": [1, 2, 30, 40], "label": "\\u732b\\n\\"x\\""}',
            [Box(1, 2, 30, 40, label='猫\n"x"')],
        ),
        ('{"bbox_2d": [1, 2, 30, 40], "text_content": "Total"}', [Box(1, 2, 30, 40, text="Total")]),
        ('{"bbox_2d": [1, 2, 30, 40], "score": 0.5}', [Box(1, 2, 30, 40, score=0.5)]),
        ('{"bbox_2d": [[1, 2, 30, 40], [5, 6, 7, 8]]}', [Box(1, 2, 30, 40), Box(5, 6, 7, 8)]),
        ('{"point_2d": [12.5, 7], "label": "nose"}', [Point(12.5, 7, label="nose")]),
        ('{"polygon": [[1, 2], [3, 4], [5, 0]]}', [Polygon(((1, 2), (3, 4), (5, 0)))]),
        ("[1, 2, 30, 40]", [Box(1, 2, 30, 40)]),
        ("[[1, 2, 30, 40], [5, 6, 7, 8]]", [Box(1, 2, 30, 40), Box(5, 6, 7, 8)]),
        ('{"answer": [1, 2, 3, 4]}', []),
        ('[{"x": 1, "y": 5}, {"x": 2, "y": 7}]', []),
        ('{"bbox_2d": [1e999, 2, 3, 4]}', []),
        ('{"bbox_2d": null, "label": true}', []),
        ("There is no cat in the picture [1].", []),
        ("", []),
    ],
    "json_boxes_yx": [
        ('```json\n[{"box_2d": [2, 1, 40, 30], "label": "cat"}]\n```', [CAT]),
        ('[{"point": [2, 1], "label": "nose"}]', [Point(1, 2, label="nose")]),
    ],
    "json_objects": [
        (
            '{"objects": [{"x_min": 0.1, "y_min": 0.2, "x_max": 0.3, "y_max": 0.4}]}',
            [Box(0.1, 0.2, 0.3, 0.4)],
        ),
        ('{"points": [{"x": 0.5, "y": 0.25}, {"x": 1, "y"', [Point(0.5, 0.25)]),
    ],
    "json_layout": [
        (
            '[{"bbox": [1, 2, 3, 4], "category": "Title", "text": "# Hi"}, {"bbox": [5, 6, 7, 8],'
            ' "category": "Picture"}, {"bbox": [9, 9, 12, 12], "category": "Table", "text": "<tab',
            [
                Box(1, 2, 3, 4, label="Title", category="Title", text="# Hi"),
                Box(5, 6, 7, 8, label="Picture", category="Picture"),
                Box(9, 9, 12, 12, label="Table", category="Table", text="<tab"),
            ],
        ),
    ],
    "ref_det": [
        ("<|ref|>cat<|/ref|><|det|>[[1, 2, 30, 40]]<|/det|>", [CAT]),
        ("cat<|/ref|><|det|>[[1, 2, 30, 40]]<|/det|><|end|>", [CAT]),
        ("<|ref|> cat <|/ref|> <|det|> [1,2,30,40] <|/det|>", [CAT]),
        ("<|ref|>cat<|det|>[[1, 2, 30, 40", []),
        ("<|ref|>cat<|det|>[[1, 2, 30, 40],[5, 6", [CAT]),
        ("<|ref|>cat<|/ref|><|det|>[[1, 2, 30, 40<|/det|>", [CAT]),
        ("<ref>cat</ref><box>[[1, 2, 30, 40]]</box>", [CAT]),
        (
            "<|ref|>cat<|/ref|><|det|>[[1, 2, 30, 40], [5, 6, 7, 8]]<|/det|>",
            [CAT, Box(5, 6, 7, 8, label="cat")],
        ),
        (
            "<|ref|>title<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>\n# Hello\n\n"
            "<|ref|>text<|/ref|><|det|>[[5, 6, 7, 8]]<|/det|>\nOne\nTwo<\uff5cend\u2581of\uff5c>",
            [
                Box(1, 2, 3, 4, label="title", text="# Hello"),
                Box(5, 6, 7, 8, label="text", text="One\nTwo"),
            ],
        ),
        ("no tags at all", []),
    ],
    "box_tags": [
        (
            "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|>",
            [CAT],
        ),
        ("<|object_ref_start|>cat<|object_ref_end|><|box_start|>( 1, 2 ),(30,40)", [CAT]),
        ("cat(1,2),(30,40)", [CAT]),
        ("cat(1,2),(30,40), dog (5,6),(7,8)", [CAT, Box(5, 6, 7, 8, label="dog")]),
        ("<|box_start|>(1,2),(30,40)<|box_end|>", [Box(1, 2, 30, 40)]),
        ("<|box_start|>(1,2),(30", []),
        (
            "<|quad_start|>(1,2),(3,2),(3,4),(1,4)<|quad_end|>",
            [Polygon(((1, 2), (3, 2), (3, 4), (1, 4)))],
        ),
    ],
    "point_tags": [
        ('<point x="10.5" y="20" alt="cat">cat</point>', [Point(10.5, 20, label="cat")]),
        ("<point x='10.5' y='20' alt='cat'", [Point(10.5, 20, label="cat")]),
        (
            'Counting the <points x1="1" y1="2" x2="3" y2="4.5" alt="dogs">dogs</points>.',
            [Point(1, 2, label="dogs", object_id=1), Point(3, 4.5, label="dogs", object_id=2)],
        ),
        ('<points x1="1" y1="2" x2="3', [Point(1, 2, object_id=1)]),
        (
            '<points coords="1 1 073 160 2 173 600;2 3 500 500" alt="boats">boats</points>',
            [
                Point(7.3, 16, label="boats", object_id=1),
                Point(17.3, 60, label="boats", object_id=2),
                Point(50, 50, label="boats", object_id=3, image_index=1),
            ],
        ),
        ('<point x="ten" y="20"/> <point>', []),
    ],
    "loc_tokens": [
        ("<loc0002><loc0001><loc0040><loc0030> cat", [CAT]),
        (
            "<loc0002><loc0001><loc0040><loc0030> cat ;<loc0006><loc0005><loc0008><loc0007>d<eos>",
            [CAT, Box(5, 6, 7, 8, label="d")],
        ),
        (
            f"<loc0002><loc0001><loc0040><loc0030>{SEGMENTS} cat",
            [Box(1, 2, 30, 40, label="cat", mask_codes=tuple(range(16)))],
        ),
        (
            "<loc0002><loc0001><loc0040><loc0030> cat ; <loc0006><loc0005><loc00",
            [CAT],
        ),
        ("<loc0002><loc0001><loc0040>", []),
        ("<loc0002><loc0001> nose", [Point(1, 2, label="nose")]),
    ],
    "loc_bins": [
        ("</s><s>cat<loc_1><loc_2><loc_30><loc_40></s>", [Box(1.5, 2.5, 30.5, 40.5, label="cat")]),
        (
            "cat<loc_1><loc_2><loc_30><loc_40><loc_5><loc_6><loc_7><loc_8>dog<loc_0><loc_0><loc_9><loc_9>",
            [
                Box(1.5, 2.5, 30.5, 40.5, label="cat"),
                Box(5.5, 6.5, 7.5, 8.5, label="cat"),
                Box(0.5, 0.5, 9.5, 9.5, label="dog"),
            ],
        ),
        (
            "Total<loc_1><loc_2><loc_9><loc_2><loc_9><loc_5><loc_1><loc_5>",
            [Polygon(((1.5, 2.5), (9.5, 2.5), (9.5, 5.5), (1.5, 5.5)), label="Total")],
        ),
        (
            "cat<loc_9><loc_2><loc_3><loc_4><loc_5><loc_6><poly><loc_9><loc_8><loc_7><loc_6><loc_5><loc_9>",
            [
                Polygon(((9.5, 2.5), (3.5, 4.5), (5.5, 6.5)), label="cat"),
                Polygon(((9.5, 8.5), (7.5, 6.5), (5.5, 9.5)), label="cat"),
            ],
        ),
    ],
    "loc_bins_boxes": [
        ("<loc_9><loc_9><loc_1><loc_1><loc_3>", [Box(1.5, 1.5, 9.5, 9.5)]),
    ],
    "loc_bins_quads": [
        (
            "A<loc_1><loc_2><loc_9><loc_2><loc_9><loc_5><loc_1><loc_5>B<loc_1>",
            [Polygon(((1.5, 2.5), (9.5, 2.5), (9.5, 5.5), (1.5, 5.5)), label="A")],
        ),
    ],
    "loc_bins_polygons": [
        (
            "<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8>",
            [Polygon(((1.5, 2.5), (3.5, 4.5), (5.5, 6.5), (7.5, 8.5)))],
        ),
    ],
}


def test_every_syntax_has_cases() -> None:
    assert set(CASES) == set(SYNTAXES)


@pytest.mark.parametrize(
    ("syntax", "text", "expected"),
    [(syntax, text, expected) for syntax, cases in CASES.items() for text, expected in cases],
)
def test_what_models_write_is_read(syntax: str, text: str, expected: list[Region]) -> None:
    found = SYNTAXES[syntax](text)
    assert found == [
        region.with_points(tuple((pytest.approx(x), pytest.approx(y)) for x, y in region.points))
        if isinstance(region, Polygon | Point)
        else region
        for region in expected
    ]


def test_an_answer_cut_anywhere_loses_at_most_its_last_region() -> None:
    boxes = [{"bbox_2d": [i, i + 1, i + 20, i + 30], "label": f"thing {i}"} for i in range(10, 15)]
    text = json.dumps(boxes)
    whole = SYNTAXES["json_boxes"](text)
    assert len(whole) == 5
    for end in range(len(text)):
        found = SYNTAXES["json_boxes"](text[:end])
        complete = text[:end].count("}")
        assert complete <= len(found) <= complete + 1
        assert [r.points for r in found] == [r.points for r in whole[: len(found)]]


def test_a_layout_keeps_the_order_of_the_answer() -> None:
    text = '[{"bbox":[9,9,10,10],"category":"Text","text":"b"},{"bbox":[0,0,1,1],"text":"a"}]'
    layout = Layout.of(SYNTAXES["json_layout"](text))
    assert [(e.category, e.text) for e in layout.elements] == [("Text", "b"), ("Text", "a")]
