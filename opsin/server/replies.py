"""Turns one request's engine events into deltas: reasoning told from the answer, tokens counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from opsin.engine.processor import Processor
from opsin.families.base import Prompt
from opsin.grounding.parsing import regions_of
from opsin.prompt.answer import AnswerReader
from opsin.prompt.tasks import find_task
from opsin.server.request import Delta, ImageSize, Request
from opsin.types import Event

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
        prompt: Prompt,
        reader: AnswerReader,
        find_regions: RegionFinder | None = None,
    ) -> None:
        self.index = index
        self._find_regions = find_regions
        self._tokens: list[int] = []
        self._prompt = prompt
        self._reader = reader

    def push(self, event: Event) -> Delta:
        """The delta of an event, empty if nothing came of it."""
        last = event.finish_reason is not None
        piece, count = self._reader.take(event)
        if self._find_regions is not None:
            self._tokens += event.token_ids
        delta = Delta(
            self.index,
            piece.text,
            piece.reasoning,
            piece.calls,
            tuple(event.logprobs),
            num_reasoning=count,
        )
        return self._last(delta, event) if last else delta

    def _last(self, delta: Delta, event: Event) -> Delta:
        calls = self._reader.num_calls and event.finish_reason == "stop"
        regions = self._find_regions(self._tokens, self._prompt) if self._find_regions else ()
        return replace(
            delta,
            finish_reason="tool_calls" if calls else event.finish_reason,
            stop_string=event.stop_string,
            usage=event.usage,
            timings=event.timings,
            images=image_sizes(self._prompt),
            video_frames=tuple(m.num_frames for m in self._prompt.media if m.num_frames),
            regions=regions,
        )


def image_sizes(prompt: Prompt) -> tuple[ImageSize, ...]:
    """The pictures of a prompt, each with the size the model saw."""
    return tuple(
        ImageSize(*item.size, *item.processed_size, item.num_tokens)
        for item in prompt.media
        if item.kind == "image"
    )
