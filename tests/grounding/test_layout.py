"""A page's elements as Markdown, HTML and JSON."""

from __future__ import annotations

import json

from opsin.grounding import Box, Element, Layout

BOX = Box(1, 2, 30, 40)


def page(*parts: tuple[str, str]) -> Layout:
    return Layout(tuple(Element(BOX, category, text) for category, text in parts))


WHOLE = page(
    ("Page-header", "ACME Ltd"),
    ("Title", "Report"),
    ("Section-header", "## 1. Sales"),
    ("Text", "Went <b>up</b> & up."),
    ("List-item", "- one"),
    ("List-item", "two"),
    ("Formula", "$$a < b$$"),
    ("Table", '<table><tr><td colspan="2" onclick="x()">1 < 2</td></tr></table>'),
    ("Picture", ""),
    ("Caption", "Figure 1"),
    ("Page-footer", "7"),
)


def test_markdown() -> None:
    assert WHOLE.to_markdown(picture=lambda element: "figure.png") == (
        "# Report\n\n## 1. Sales\n\nWent <b>up</b> & up.\n\n- one\n- two\n\n$$\na < b\n$$\n\n"
        '<table><tr><td colspan="2">1 &lt; 2</td></tr></table>\n\n![](figure.png)\n\nFigure 1\n'
    )
    assert "ACME" in WHOLE.to_markdown(furniture=True)
    assert "![" not in WHOLE.to_markdown()
    assert Layout().to_markdown() == Layout().to_html() == ""


def test_html_escapes_what_the_model_says() -> None:
    text = WHOLE.to_html(picture=lambda element: 'a"b.png')
    assert "<h1>Report</h1>\n<h2>1. Sales</h2>\n<p>Went &lt;b&gt;up&lt;/b&gt; &amp; up.</p>" in text
    assert "<ul>\n<li>one</li>\n<li>two</li>\n</ul>" in text
    assert r"<p>\[a &lt; b\]</p>" in text
    assert '<td colspan="2">1 &lt; 2</td>' in text
    assert '<img src="a&quot;b.png" alt="">' in text
    hostile = page(
        ("Table", "<table><script>x</script><td><img src=x onerror=y><TD rowspan='3' style=z>"),
        ("Title", "<script>"),
        ("List-item", "<script>"),
    ).to_html()
    assert "<script" not in hostile
    assert "<img" not in hostile
    assert '<td rowspan="3">' in hostile


def test_json_is_the_form_that_models_write() -> None:
    rows = json.loads(page(("Title", "Ü")).to_json())
    assert rows == [{"bbox": [1, 2, 30, 40], "category": "Title", "text": "Ü"}]


def test_other_spellings_of_categories_are_understood() -> None:
    for category, start in (("sub_title", "## "), ("Doc Title", "# "), ("unheard-of", "x")):
        assert page((category, "x")).to_markdown().startswith(start)


def test_a_layout_comes_from_regions() -> None:
    box = Box(0, 0, 5, 5, label="title", text="# Hi", image_size=(10, 10))
    layout = Layout.of([box])
    assert layout.image_size == (10, 10)
    assert layout.to_markdown() == "# Hi\n"
