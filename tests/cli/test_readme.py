"""The README says what the code says."""

from __future__ import annotations

from pathlib import Path

from opsin.cli.models import family_table, markdown_table

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- families:begin -->\n", "<!-- families:end -->"


def test_the_table_of_families_is_the_code_s() -> None:
    text = README.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    message = "run: python -m opsin models --markdown, and put its output between the markers"
    assert shown.strip() == markdown_table(family_table()).strip(), message
