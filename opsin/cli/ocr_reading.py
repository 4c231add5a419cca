"""Reads pages: asks a model for the text of a picture, and cuts out the pictures on it."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image

from opsin.api import GenerationResult, fold, stream_generate
from opsin.cli.ocr_pages import PageText
from opsin.engine.model import Model
from opsin.engine.processor import Processor
from opsin.grounding.layout import Element
from opsin.media.document import Document

# What is asked of a model whose family has no task for it.
PROMPT = "Read the text."
KEEP_CROP = 2  # pixels: a picture with a shorter side is a line or a speck


@dataclass(frozen=True, slots=True)
class Asking:
    """What is asked about every page: a task or a prompt, and the sampling parameters."""

    prompt: str
    task: str | None
    options: dict[str, Any]

    @classmethod
    def of(
        cls, processor: Processor, prompt: str | None, task: str | None, options: dict[str, Any]
    ) -> Asking:
        """The task or prompt given, else the family's own way to read a page."""
        tasks = processor.family.tasks
        if prompt is None and task is None:
            pages = [name for name, known in tasks.items() if known.layout and not known.takes_text]
            task = next(iter(pages), "ocr" if "ocr" in tasks else None)
            prompt = PROMPT if task is None else ""
        return cls(prompt or "", task, options)


class Stopped(Exception):
    """The run ends: pages at work are let go."""


class Reader:
    """Reads single pages, from any number of threads at once."""

    def __init__(self, model: Model, processor: Processor, asking: Asking) -> None:
        self.model = model
        self.processor = processor
        self.asking = asking
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the pages at work at their next token."""
        self._stop.set()

    def read(
        self, document: Document, number: int, dpi: float | None
    ) -> tuple[PageText, list[tuple[int, Image.Image]]]:
        """A page's text, and its pictures with their places among the elements."""
        if self._stop.is_set():
            raise Stopped
        image = document.page(number, dpi)
        result = self._ask(image)
        elements = elements_of(result)
        page = PageText(
            number,
            image.size,
            result.text,
            elements,
            finish_reason=result.finish_reason or "stop",
            tokens=result.generation_tokens,
        )
        crops = []
        for place, element in enumerate(elements or ()):
            box = tuple(round(side) for side in element.bbox.bounds)
            wide, high = box[2] - box[0], box[3] - box[1]
            if element.kind == "picture" and min(wide, high) > KEEP_CROP:
                crops.append((place, image.crop((box[0], box[1], box[2], box[3]))))
        return page, crops

    def _ask(self, image: Image.Image) -> GenerationResult:
        asking = self.asking
        stream = cast(
            "Generator[GenerationResult]",
            stream_generate(
                self.model,
                self.processor,
                asking.prompt,
                image,
                task=asking.task,
                **asking.options,
            ),
        )
        kept = []
        with closing(stream):
            for result in stream:
                if self._stop.is_set():
                    raise Stopped
                kept.append(result)
        return fold(iter(kept))


def elements_of(result: GenerationResult) -> tuple[Element, ...] | None:
    """The page's parts, where the answer tells them.

    An answer that should and does not is kept as text: better raw than nothing.
    """
    if result.layout is None:
        return None
    told = result.layout.elements
    empty = result.text.strip() in ("", "[]", "```json\n[]\n```")
    return told if told or empty else None
