"""Turns one request's engine events into deltas: reasoning told from the answer, tokens counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from opsin.engine.processor import Processor
from opsin.families.base import Prompt
from opsin.grounding.parsing import regions_of
from opsin.prompt.stream import THINK, StreamSplitter, Tag, open_tag
from opsin.prompt.tasks import find_task
from opsin.server.request import Delta, ImageSize, Request
from opsin.types import Event


def reasoning_tags(processor: Processor) -> tuple[Tag, ...]:
    """The tags around a model's reasoning, none where its vocabulary has no such tokens."""
    known = processor.tokenizer.token_to_id(THINK.start) is not None
    mentions = processor.chat_template is not None and any(
        THINK.start in source or THINK.end in source
        for source in processor.chat_template.sources.values()
    )
    return (THINK,) if known or mentions else ()


# (an answer's tokens, its prompt) -> what it says of places in the pictures, as plain values
RegionFinder: TypeAlias = Callable[[Sequence[int], Prompt], tuple[dict[str, Any], ...]]


def region_finder(processor: Processor, request: Request) -> RegionFinder | None:
    """What reads the boxes and points of an answer; None where there can be none."""
    family = processor.family
    task = None if request.task is None else find_task(family, request.task)
    ways = task.grounding if task is not None else ()
    if not request.has_media or not (ways or family.grounding):
        return None

    def find(token_ids: Sequence[int], prompt: Prompt) -> tuple[dict[str, Any], ...]:
        found = regions_of(token_ids, processor, prompt.media, ways)
        return tuple(region.to_dict() for region in found)

    return find


class Reader:
    """One answer on its way out: events in, deltas out."""

    def __init__(
        self,
        index: int,
        request: Request,
        prompt: Prompt,
        tags: Sequence[Tag],
        find_regions: RegionFinder | None = None,
    ) -> None:
        self.index = index
        self._find_regions = find_regions
        self._tokens: list[int] = []
        self._prompt = prompt
        is_chat = bool(request.messages)
        opened = open_tag(prompt.text, tags) if is_chat else None
        self._splitter = StreamSplitter(tags, opened) if is_chat and tags else None
        self._reasons = opened is not None
        self._trim = opened is not None  # a block's first newlines are the template's, not words

    def push(self, event: Event) -> Delta:
        """The delta of an event, empty if nothing came of it."""
        text, reasoning = self._split(event.text, last=event.finish_reason is not None)
        count = len(event.token_ids) if self._reasons else 0
        if self._find_regions is not None:
            self._tokens += event.token_ids
        if event.finish_reason is None:
            return Delta(
                self.index, text, reasoning, (), tuple(event.logprobs), num_reasoning=count
            )
        return Delta(
            self.index,
            text,
            reasoning,
            (),
            tuple(event.logprobs),
            event.finish_reason,
            event.stop_string,
            event.usage,
            count,
            event.timings,
            image_sizes(self._prompt),
            self._find_regions(self._tokens, self._prompt) if self._find_regions else (),
        )

    def _split(self, text: str, *, last: bool) -> tuple[str, str]:
        """Answer text and reasoning of what came."""
        if self._splitter is None:
            return text, ""
        segments = self._splitter.push(text)
        if last:
            segments += self._splitter.finish()
        parts: dict[str, list[str]] = {"text": [], "reasoning": []}
        for segment in segments:
            reasons = segment.kind == "reasoning"
            if reasons != self._reasons:
                self._trim = True
            held = segment.text.lstrip("\n") if self._trim else segment.text
            self._trim = self._trim and not held
            parts["reasoning" if reasons else "text"].append(held)
            self._reasons = reasons and not segment.done
            self._trim = self._trim or segment.done
        return "".join(parts["text"]), "".join(parts["reasoning"])


def image_sizes(prompt: Prompt) -> tuple[ImageSize, ...]:
    """The pictures of a prompt, each with the size the model saw."""
    return tuple(
        ImageSize(*item.size, *item.processed_size, item.num_tokens)
        for item in prompt.media
        if item.kind == "image"
    )
