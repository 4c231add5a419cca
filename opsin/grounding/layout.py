"""A page as a model read it: its elements in reading order, as Markdown, HTML or JSON."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opsin.grounding.regions import Box, Region

# Running heads and feet: left out of a text unless asked for.
FURNITURE = frozenset({"page-header", "page-footer", "header", "footer", "page-number"})
_KINDS = {
    "title": "title",
    "doc-title": "title",
    "section-header": "heading",
    "paragraph-title": "heading",
    "sub-title": "heading",
    "heading": "heading",
    "list-item": "item",
    "list": "item",
    "formula": "formula",
    "equation": "formula",
    "table": "table",
    "picture": "picture",
    "figure": "picture",
    "image": "picture",
}
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)([^<>]*)>|[<>]")
_SPAN = re.compile(r"\b(colspan|rowspan)\s{0,8}=\s{0,8}[\"']?([0-9]{1,4})", re.IGNORECASE)
_TABLE_TAGS = frozenset(
    {"table", "thead", "tbody", "tfoot", "tr", "td", "th", "caption"}
    | {"b", "i", "u", "em", "strong", "sub", "sup", "br", "p"}
)
_HEADING_MARKS = re.compile(r"#{1,6}[ \t]+")
_BULLET = re.compile(r"[-*\u2022\u00b7][ \t]+|[0-9]{1,4}[.)][ \t]+")


@dataclass(frozen=True, slots=True)
class Element:
    """One part of a page: where it stands (pixels), what it is and what it says.

    Formulas are LaTeX, tables HTML, anything else Markdown or plain text; a picture says nothing.
    """

    bbox: Box
    category: str
    text: str = ""

    @property
    def name(self) -> str:
        """The category in lower case with hyphens, however the model spells it."""
        return re.sub(r"[\s_]+", "-", self.category.strip().lower())

    @property
    def kind(self) -> str:
        """title, heading, item, formula, table, picture or text."""
        return _KINDS.get(self.name, "text")


@dataclass(frozen=True, slots=True)
class Layout:
    """The elements of a page in reading order; image_size is the page's (width, height)."""

    elements: tuple[Element, ...] = ()
    image_size: tuple[int, int] | None = None

    @classmethod
    def of(cls, regions: Sequence[Region]) -> Layout:
        """A layout from the regions of an answer about one page."""
        elements = []
        for region in regions:
            box = Box(*region.bounds, image_size=region.image_size)
            category = region.category or region.label or "Text"
            elements.append(Element(box, category, region.text))
        return cls(tuple(elements), regions[0].image_size if regions else None)

    def body(self, furniture: bool = False) -> tuple[Element, ...]:
        """The elements that a reader reads, with running heads and feet if asked."""
        return tuple(e for e in self.elements if furniture or e.name not in FURNITURE)

    def to_markdown(
        self, *, furniture: bool = False, picture: Callable[[Element], str] | None = None
    ) -> str:
        """The page as Markdown; `picture` gives the address of a picture element's file."""
        blocks: list[str] = []
        previous = ""
        for element in self.body(furniture):
            block = _markdown(element, picture)
            if block and element.kind == previous == "item":
                blocks[-1] += "\n" + block
            elif block:
                blocks.append(block)
            previous = element.kind if block else previous
        return "\n\n".join(blocks) + "\n" if blocks else ""

    def to_json(self, *, indent: int | None = None) -> str:
        """The elements as JSON in the form `[{"bbox": [...], "category": ..., "text": ...}]`."""
        rows = [
            {
                "bbox": [round(v, 2) for v in element.bbox.bounds],
                "category": element.category,
                "text": element.text,
            }
            for element in self.elements
        ]
        return json.dumps(rows, ensure_ascii=False, indent=indent)

    def to_html(
        self, *, furniture: bool = False, picture: Callable[[Element], str] | None = None
    ) -> str:
        """The page as an HTML fragment.

        Text is escaped, and of a table only its own tags pass: an answer cannot bring a script.
        """
        lines: list[str] = []
        listing = False
        for element in self.body(furniture):
            if (element.kind == "item") != listing:
                listing = not listing
                lines.append("<ul>" if listing else "</ul>")
            lines.append(_html(element, picture))
        if listing:
            lines.append("</ul>")
        return "\n".join(line for line in lines if line) + "\n" if lines else ""


def _markdown(element: Element, picture: Callable[[Element], str] | None) -> str:
    text, kind = element.text.strip(), element.kind
    if kind == "picture":
        return f"![{_one_line(text)}]({picture(element)})" if picture else text
    if not text:
        return ""
    if kind in ("title", "heading"):
        if _HEADING_MARKS.match(text):
            return text
        return ("# " if kind == "title" else "## ") + _one_line(text)
    if kind == "item":
        return text if _BULLET.match(text) else f"- {text}"
    if kind == "formula":
        return f"$$\n{bare_formula(text)}\n$$"
    return safe_table(text) if kind == "table" else text


def _html(element: Element, picture: Callable[[Element], str] | None) -> str:
    text, kind = element.text.strip(), element.kind
    plain = html.escape(text).replace("\n", "<br>\n")
    if kind == "picture":
        if picture is None:
            return f"<p>{plain}</p>" if text else ""
        source, said = html.escape(picture(element)), html.escape(_one_line(text))
        return f'<img src="{source}" alt="{said}">'
    if not text:
        return ""
    if kind in ("title", "heading"):
        level = "1" if kind == "title" else "2"
        return f"<h{level}>{html.escape(_HEADING_MARKS.sub('', _one_line(text)))}</h{level}>"
    if kind == "item":
        bullet = _BULLET.match(text)
        unmarked = bullet is not None and not text[0].isdigit()
        return f"<li>{html.escape(text[bullet.end() :]) if bullet and unmarked else plain}</li>"
    if kind == "formula":
        return f"<p>\\[{html.escape(bare_formula(text))}\\]</p>"
    return safe_table(text) if kind == "table" else f"<p>{plain}</p>"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def bare_formula(text: str) -> str:
    """A formula without the dollar signs or brackets around it."""
    for opening, closing in (("$$", "$$"), ("\\[", "\\]"), ("\\(", "\\)"), ("$", "$")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening) * 2:
            return text[len(opening) : -len(closing)].strip()
    return text


def safe_table(text: str) -> str:
    """A table's HTML with only the tags of tables and plain emphasis; other brackets as text.

    Of attributes, colspan and rowspan stay.
    """

    def tag(found: re.Match[str]) -> str:
        name = (found[2] or "").lower()
        if name not in _TABLE_TAGS:
            return html.escape(found[0])
        spans = "" if found[1] else "".join(f' {m[1].lower()}="{m[2]}"' for m in _spans(found[3]))
        return f"<{found[1]}{name}{spans}>"

    return _TAG.sub(tag, text)


def _spans(attributes: str) -> list[re.Match[str]]:
    return list(_SPAN.finditer(attributes))
