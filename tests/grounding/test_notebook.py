"""What a notebook shows of an answer: tables, lines, pages; never a script."""

from __future__ import annotations

import opsin
from opsin.grounding.layout import Element, Layout
from opsin.grounding.notebook import markdown
from opsin.grounding.regions import Box

TABLE = "| City | Days |\n| --- | --- |\n| Oslo | 3 |"


def test_tables_stay_and_lines_are_lines() -> None:
    assert markdown(TABLE) == TABLE
    assert markdown("one\ntwo") == "one  \ntwo  "
    assert markdown("# head\n\ntext") == "# head\n\ntext  "


def test_nothing_of_an_answer_runs() -> None:
    shown = markdown('a <script>x</script>\n<table onclick="x"><tr><td>1</td></tr></table>')
    assert shown == ("a &lt;script&gt;x&lt;/script&gt;  \n<table><tr><td>1</td></tr></table>")


def test_code_stays_as_it_is() -> None:
    code = "```html\n<b>1</b>\nx\n```"
    assert markdown(code + "\nend") == code + "\nend  "


def test_a_result_shows_its_text_or_its_page() -> None:
    plain = opsin.GenerationResult("a\nb")
    assert (plain._repr_markdown_(), plain._repr_html_(), plain._repr_png_()) == (
        "a  \nb  ",
        None,
        None,
    )
    elements = (Element(Box(0, 0, 1, 1), "Table", "<table><tr><td>1</td></tr></table>"),)
    read = opsin.GenerationResult("[]", layout=Layout(elements))
    assert read._repr_html_() == "<table><tr><td>1</td></tr></table>\n"
    assert read._repr_markdown_() is None
