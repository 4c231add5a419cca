"""Pages that were read: kept on disk so that none is read twice, and put together as documents."""

from __future__ import annotations

import dataclasses
import hashlib
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsin.grounding.layout import Element, Layout, safe_table
from opsin.grounding.regions import Box

FORMATS = ("md", "json", "html")
_TABLE = re.compile(r"<table\b.{0,200000}?</table\s*>", re.IGNORECASE | re.DOTALL)
_STYLE = "body{max-width:50em;margin:2em auto;padding:0 1em;font-family:sans-serif}"
_STYLE += (
    "table{border-collapse:collapse}td,th{border:1px solid;padding:.2em .5em}img{max-width:100%}"
)


@dataclass(frozen=True, slots=True)
class PageText:
    """One page as it was read.

    number: from 1. size: (width, height) in pixels. elements: the page's parts in reading order,
    for models that tell them; pictures: the file of each element that is a picture, by its place in
    the list. finish_reason "length" means that the text was cut off.
    """

    number: int
    size: tuple[int, int]
    text: str
    elements: tuple[Element, ...] | None = None
    pictures: Mapping[int, str] = dataclasses.field(default_factory=dict)
    finish_reason: str = "stop"
    tokens: int = 0

    @property
    def layout(self) -> Layout | None:
        """The page's parts, where the model told them."""
        return None if self.elements is None else Layout(self.elements, self.size)

    def markdown(self, furniture: bool = False) -> str:
        """The page as Markdown."""
        if self.layout is None:
            return self.text.strip() + "\n"
        return self.layout.to_markdown(furniture=furniture, picture=self._picture())

    def html(self, furniture: bool = False) -> str:
        """The page as an HTML fragment that holds no script."""
        if self.layout is None:
            return as_html(self.text)
        return self.layout.to_html(furniture=furniture, picture=self._picture())

    def _picture(self) -> Callable[[Element], str] | None:
        if not self.pictures or self.elements is None:
            return None
        files = {id(self.elements[place]): name for place, name in self.pictures.items()}
        return lambda element: files.get(id(element), "")

    def to_dict(self) -> dict[str, Any]:
        """The page as plain JSON values."""
        made: dict[str, Any] = {
            "page": self.number,
            "width": self.size[0],
            "height": self.size[1],
            "text": self.text,
            "finish_reason": self.finish_reason,
            "tokens": self.tokens,
        }
        if self.layout is None:
            return made
        elements = json.loads(self.layout.to_json())
        for place, name in self.pictures.items():
            elements[place]["picture"] = name
        return {**made, "elements": elements}

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> PageText:
        """What `to_dict` made."""
        size = (int(held["width"]), int(held["height"]))
        rows = held.get("elements")
        elements = None
        if rows is not None:
            elements = tuple(
                Element(Box(*row["bbox"], image_size=size), row["category"], row["text"])
                for row in rows
            )
        pictures = {i: row["picture"] for i, row in enumerate(rows or ()) if "picture" in row}
        return cls(
            int(held["page"]),
            size,
            str(held["text"]),
            elements,
            pictures,
            str(held["finish_reason"]),
            int(held["tokens"]),
        )


@dataclass(frozen=True, slots=True)
class DocumentText:
    """All pages of a document that were read, and what went wrong on the others, by page number.

    Number 0 stands for the document itself.
    """

    source: str
    model: str
    pages: Sequence[PageText]
    errors: Mapping[int, str]

    def render(self, form: str, furniture: bool = False) -> str:
        """The document as md, json or html."""
        if form == "json":
            return self.json(indent=1) + "\n"
        return self.html(furniture) if form == "html" else self.markdown(furniture)

    def markdown(self, furniture: bool = False) -> str:
        """The pages one after another, under comments with their numbers if there are several."""
        blocks = []
        for number, page in self._numbered():
            if page is None:
                blocks.append(_comment(f"page {number}: {self.errors[number]}") + "\n")
                continue
            mark = _comment(f"page {number}") + "\n\n" if self._is_long else ""
            blocks.append(mark + page.markdown(furniture))
        return "\n".join(blocks)

    def html(self, furniture: bool = False) -> str:
        """One HTML page with a section for each page."""
        title = html.escape(Path(self.source).name)
        lines = [
            "<!DOCTYPE html>",
            f'<html><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{_STYLE}</style></head><body>",
        ]
        for number, page in self._numbered():
            lines.append(f'<section id="page-{number}">')
            lines.append(page.html(furniture) if page else f"<p>{html.escape(self.errors[number])}")
            lines.append("</section>")
        return "\n".join([*lines, "</body></html>"]) + "\n"

    def json(self, indent: int | None = None) -> str:
        """Source, model, pages and errors as JSON."""
        made = {
            "source": self.source,
            "model": self.model,
            "pages": [page.to_dict() for page in self.pages],
            "errors": [{"page": number, "error": said} for number, said in self.errors.items()],
        }
        return json.dumps(made, ensure_ascii=False, indent=indent)

    @property
    def _is_long(self) -> bool:
        return len(self.pages) + len(self.errors) > 1

    def _numbered(self) -> list[tuple[int, PageText | None]]:
        read: dict[int, PageText | None] = {page.number: page for page in self.pages}
        return sorted({**dict.fromkeys(self.errors), **read}.items())


def _comment(text: str) -> str:
    return f"<!-- {text.replace('--', '- -')} -->"


def as_html(text: str) -> str:
    """Markdown of a model as HTML: tables in HTML keep a table's own tags, other tags are text."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table")
    pieces: list[str] = []
    done = 0
    for table in _TABLE.finditer(text):
        pieces.append(reader.render(text[done : table.start()]))
        pieces.append(safe_table(table[0]) + "\n")
        done = table.end()
    return "".join([*pieces, reader.render(text[done:])])


class PageStore:
    """Where the pages of one document are kept while and after it is read.

    `settings` is everything that the text depends on: pages that were read with others are read
    again.
    """

    def __init__(self, folder: Path, settings: Any) -> None:
        self.folder = folder
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]

    def load(self) -> tuple[int, dict[int, PageText]]:
        """How many pages the document has (0: not known), and those that were read."""
        total, pages = 0, {}
        for file in sorted(self.folder.glob("*.json")):
            try:
                held = json.loads(file.read_text(encoding="utf-8"))
                if held["key"] != self.key:
                    continue
                page = PageText.from_dict(held)
                total = int(held["of"])
            except (OSError, ValueError, LookupError, TypeError):
                continue  # a record that cannot be read is a page that was not
            pages[page.number] = page
        return total, pages

    def save(self, page: PageText, total: int) -> None:
        """Keep a page; a run that is cut off meanwhile leaves it whole or not at all."""
        record = {"key": self.key, "of": total, **page.to_dict()}
        write_whole(self.folder / f"{page.number:05}.json", json.dumps(record, ensure_ascii=False))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that others see all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
