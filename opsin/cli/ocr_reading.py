"""Reads pages: asks a model for the text of a picture, and cuts out the pictures on it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from PIL import Image

from opsin.api import Answering, GenerationResult, ask, checked_sampling
from opsin.cli.ocr_pages import PageText
from opsin.engine.model import Model
from opsin.engine.processor import Processor
from opsin.grounding.layout import Element
from opsin.media.document import Document
from opsin.prompt.tasks import find_task

# What is asked of a model whose family has no task for it.
PROMPT = "Read the text."
# Pages that are drawn and prepared at once: any more delay the first, which the model waits for.
PREPARED_AT_ONCE = 2
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
        """The task or prompt given, else the family's own way to read a page.

        Raises InputError for a task that the model does not have, and for a bad `max_tokens`.
        """
        checked_sampling({"max_tokens": options["max_tokens"]})
        if task is not None:
            find_task(processor.family, task)
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
        self._preparing = threading.Semaphore(PREPARED_AT_ONCE)
        self._lock = threading.Lock()
        self._stopped = False
        self._at_work: set[Answering] = set()

    def stop(self) -> None:
        """End the pages at work at their next token."""
        with self._lock:
            self._stopped = True
            for answering in self._at_work:
                answering.cancel()

    def read(
        self, document: Document, number: int, dpi: float | None
    ) -> tuple[PageText, list[tuple[int, Image.Image]]]:
        """A page's text, and its pictures with their places among the elements."""
        with self._preparing:
            if self._stopped:
                raise Stopped
            image = document.page(number, dpi)
            answering = self._ask(image)
        result = self._answer(answering)
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

    def _ask(self, image: Image.Image) -> Answering:
        options = {"task": self.asking.task, **self.asking.options}
        answering = ask(
            self.model, self.processor, self.asking.prompt, {"image": image}, options, whole=True
        )
        with self._lock:
            self._at_work.add(answering)
            if self._stopped:
                answering.cancel()
        return answering

    def _answer(self, answering: Answering) -> GenerationResult:
        try:
            result = answering.whole()
        finally:
            with self._lock:
                self._at_work.remove(answering)
        if result.finish_reason == "cancelled":
            raise Stopped
        return result


def elements_of(result: GenerationResult) -> tuple[Element, ...] | None:
    """The page's parts, where the answer tells them.

    An answer that should and does not is kept as text: better raw than nothing.
    """
    if result.layout is None:
        return None
    told = result.layout.elements
    empty = result.text.strip() in ("", "[]", "```json\n[]\n```")
    return told if told or empty else None
