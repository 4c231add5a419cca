"""Whatever a model writes: no parser raises, and none takes more than linear time."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsin.grounding import patch_points
from opsin.grounding.layout import Layout
from opsin.grounding.parsing import placed
from opsin.grounding.regions import Region
from opsin.grounding.sloppy_json import read_values
from opsin.grounding.syntax import SYNTAXES
from opsin.types import Frame, Grounding

METADATA = {
    "token_pooling": np.array([[0, 1, -1, -1], [2, 3, -1, 5]]),
    "subpatch_mapping": [np.array([[0, 1], [2, 2]]), np.array([[3]])],
    "image_sizes": [(40, 20), (10, 10)],
}
PARSERS: dict[str, Callable[[str], list[Region]]] = {
    **SYNTAXES,
    "patch_points": lambda text: patch_points.parse(text, METADATA),
}

# Pieces of every syntax, so that random strings of them go deep into each parser.
PIECES = (
    *'[](){},:"' + "'\\;\n\t ",
    *("-", ".", "1", "23", "1e9", "9" * 400, "-7.5", "\u0661", "null", "True", "NaN", "Infinity"),
    *('"bbox_2d"', '"bbox": ', '"label": ', '"point_2d"', '"points"', '"polygon"', "'box'"),
    *('"x_min":0.1,', '"x":', '"y":', '"text":"', "\\u12", "\\ud800", '\\"', "```json", "cat"),
    *("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<box>", "</box>", "[[1, 2, 3, 4]]"),
    *("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "(1,2),(3,4)", "<|quad_start|>"),
    *("<point ", "<points ", 'x="', 'y1="2"', 'coords="1 1 2 3', 'alt="', "/>", "</point>", ">"),
    *("<loc0123>", "<seg001>", "<loc_12>", "<poly>", "<sep>", "</s>", "<loc", "<", "<|", "\uff5c"),
    *("<POINT_0>", "<POINT_3> ", "<POINT_7>", "<POINT_99999>", "1", "<table>", "<td colspan=2>"),
)
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    st.text(max_size=200),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.sampled_from(["bbox_2d", "label", "box", "point", "x1"]), inner)
        ),
        max_leaves=20,
    ).map(repr),
)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_a_parser_never_raises_and_its_regions_can_be_placed(name: str, text: str) -> None:
    for region in PARSERS[name](text):
        there = placed(region, Grounding(name, 1000), Frame(50, 40, -0.1, 0, 1.2, 1), (300, 200))
        for x, y in there.points:
            assert 0 <= x <= 300
            assert 0 <= y <= 200
        assert all(math.isfinite(number) for number in there.normalized(1000))
        there.to_dict()


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_a_layout_of_anything_can_be_written(text: str) -> None:
    layout = Layout.of(SYNTAXES["json_layout"](text))
    layout.to_json().encode()
    layout.to_markdown().encode()
    page = layout.to_html()
    page.encode()
    assert "<script" not in page.lower()


HOSTILE = {
    "open brackets": "[",
    "open objects": '{"a":',
    "open and close": "[}",
    "quotes": '["a" b ',
    "escapes": '["\\',
    "white space": '["a"   ',
    "spaces": " ",
    "numbers": "[1,2,3,4",
    "digits": "1",
    "signs": "[-",
    "keys": '{"bbox_2d":[1,2,3,4],"label":"x"},',
    "opening tags": "<|ref|>",
    "det tags": "<|ref|>a<|/ref|><|det|>[[",
    "box tags": "<|box_start|>(1,2",
    "pairs": "(1,2),(3,4",
    "pair starts": "( ",
    "points": '<point x="1" y="2"',
    "attributes": '<points x1="1" y1="2',
    "words": "<point a a a a=",
    "coords": '<points coords="1 1 2 3;',
    "angles": "<",
    "locations": "<loc0123>",
    "masks": "<loc0001><seg000>",
    "bins": "<loc_1>",
    "phrases": "a<loc_1>",
    "triples": "<POINT_1> <POINT_4>",
    "closers": ">x</points>",
}


@pytest.fixture
def _uncollected() -> Iterator[None]:
    """No garbage collection: what it costs depends on all that other tests left behind."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_uncollected")
@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_the_time_grows_with_the_length_and_no_faster(unit: str) -> None:
    def seconds(length: int, parse: Callable[[str], object]) -> float:
        text = unit * (length // len(unit))
        best = math.inf
        for _ in range(3):
            started = time.process_time()
            parse(text)
            best = min(best, time.process_time() - started)
        return best

    for name, parse in (*PARSERS.items(), ("values", read_values)):
        short, long = seconds(4_000, parse), seconds(32_000, parse)
        # Eight times the text: 64 times the time if it were quadratic.
        assert long < 32 * short + 0.05, f"{name}: {short:.4f} s, then {long:.4f} s"
