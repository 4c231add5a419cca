"""Deltas to OpenAI's response object and its events, in the official order."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opsin.prompt.token_bytes import TokenNames
from opsin.server import openai_chat
from opsin.server.openai_responses import Asked
from opsin.server.request import Answer, Delta, Head, Totals
from opsin.types import TokenLogprob, ToolCall


def shell(head: Head, asked: Asked) -> dict[str, Any]:
    """A response without output, as it is when it begins."""
    fields, request = asked.fields, asked.request
    effort = fields.reasoning.effort if fields.reasoning else None
    form = fields.text.format if fields.text else None
    return {
        "id": head.id,
        "object": "response",
        "created_at": head.created,
        "status": "in_progress",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": fields.instructions,
        "max_output_tokens": fields.max_output_tokens,
        "metadata": fields.metadata or {},
        "model": head.model,
        "output": [],
        "parallel_tool_calls": request.wanted.parallel_tool_calls,
        "previous_response_id": fields.previous_response_id,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": asked.stores,
        "temperature": request.sampling.temperature,
        "text": {"format": form or {"type": "text"}},
        "tool_choice": fields.tool_choice or "auto",
        "tools": fields.tools or [],
        "top_p": request.sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": fields.user,
    }


def finished(begun: dict[str, Any], answer: Answer, output: list[dict[str, Any]]) -> dict[str, Any]:
    """The response at its end."""
    complete = answer.finish_reason != "length"
    totals = Totals.of([answer])
    return {
        **begun,
        "status": "completed" if complete else "incomplete",
        "incomplete_details": None if complete else {"reason": "max_output_tokens"},
        "completed_at": int(time.time()) if complete else None,
        "output": output,
        "usage": {
            "input_tokens": totals.prompt,
            "input_tokens_details": {
                "cached_tokens": totals.cached,
                "image_tokens": totals.image,
                "audio_tokens": totals.audio,
            },
            "output_tokens": totals.generated,
            "output_tokens_details": {"reasoning_tokens": totals.reasoning},
            "total_tokens": totals.prompt + totals.generated,
        },
        "timings": openai_chat.timings(answer.timings),
        "images": openai_chat.images(answer),
        **openai_chat.video_frames(answer),
        "regions": list(answer.regions),
    }


def _new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


@dataclass(slots=True)
class Item:
    """An output item while it grows: reasoning, a message, or a call."""

    kind: str
    id: str
    index: int
    call: ToolCall | None = None
    text: str = ""
    logprobs: tuple[dict[str, Any], ...] = ()

    def part(self) -> dict[str, Any]:
        """The one content part of reasoning or a message."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {
            "type": "output_text",
            "text": self.text,
            "annotations": [],
            "logprobs": list(self.logprobs),
        }

    def render(self, status: str) -> dict[str, Any]:
        """The item as the response holds it; while in progress it has no content yet."""
        if self.kind == "reasoning":
            content = [] if status == "in_progress" else [self.part()]
            return {"id": self.id, "type": "reasoning", "summary": [], "content": content}
        if self.call is not None:
            return {
                "id": self.id,
                "type": "function_call",
                "status": status,
                "call_id": self.call.id,
                "name": self.call.name,
                "arguments": self.text,
            }
        content = [] if status == "in_progress" else [self.part()]
        return {
            "id": self.id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }


class EventRenderer:
    """Deltas to the events of one response; `on_done` is given the finished response."""

    def __init__(
        self,
        head: Head,
        asked: Asked,
        names: TokenNames,
        on_done: Callable[[dict[str, Any]], None],
    ) -> None:
        self.begun = shell(head, asked)
        self.names = names
        self.on_done = on_done
        self.sequence = 0
        self.answer = Answer()
        self.output: list[dict[str, Any]] = []
        self.item: Item | None = None

    def opening(self) -> list[dict[str, Any]]:
        """The response has begun."""
        return [
            self._event("response.created", response=self.begun),
            self._event("response.in_progress", response=self.begun),
        ]

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """The events that a delta makes."""
        self.answer.add(delta)
        events: list[dict[str, Any]] = []
        if delta.reasoning:
            events += self._open("reasoning")
            events.append(self._grow("response.reasoning_text.delta", delta.reasoning))
        if delta.text:
            events += self._open("message")
            logprobs = self._logprobs(delta.logprobs)
            event = self._grow("response.output_text.delta", delta.text)
            assert self.item is not None
            self.item.logprobs += tuple(logprobs)
            events.append({**event, "logprobs": logprobs})
        for call in delta.tool_calls:
            events += self._open(f"call {call.index}", call)
            if call.arguments:
                events.append(self._grow("response.function_call_arguments.delta", call.arguments))
        return events

    def closing(self) -> list[dict[str, Any]]:
        """The last item's end, and the response's."""
        length = self.answer.finish_reason == "length"
        events = self._close("incomplete" if length else "completed")
        response = finished(self.begun, self.answer, self.output)
        self.on_done(response)
        return [*events, self._event(f"response.{response['status']}", response=response)]

    def _logprobs(self, values: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = openai_chat.logprobs(values, self.names)["content"]
        return content

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self.sequence, **fields}
        self.sequence += 1
        return event

    def _grow(self, kind: str, text: str) -> dict[str, Any]:
        assert self.item is not None
        self.item.text += text
        place = {} if self.item.call is not None else {"content_index": 0}
        return self._event(
            kind, item_id=self.item.id, output_index=self.item.index, **place, delta=text
        )

    def _open(self, kind: str, call: ToolCall | None = None) -> list[dict[str, Any]]:
        """Begin an item of another kind, after ending the one before it."""
        if self.item is not None and self.item.kind == kind:
            return []
        events = self._close("completed")
        prefix = {"reasoning": "rs_", "message": "msg_"}.get(kind, "fc_")
        self.item = item = Item(kind, _new_id(prefix), len(self.output), call)
        begun = item.render("in_progress")
        events.append(
            self._event("response.output_item.added", output_index=item.index, item=begun)
        )
        if call is None:
            events.append(
                self._event(
                    "response.content_part.added",
                    item_id=item.id,
                    output_index=item.index,
                    content_index=0,
                    part=item.part(),
                )
            )
        return events

    def _close(self, status: str) -> list[dict[str, Any]]:
        """End the item that is open."""
        item, self.item = self.item, None
        if item is None:
            return []
        place = {"item_id": item.id, "output_index": item.index}
        if item.call is not None:
            kind, said = "response.function_call_arguments.done", {"arguments": item.text}
            events = [self._event(kind, **place, name=item.call.name, **said)]
        else:
            place["content_index"] = 0
            kind = "reasoning_text" if item.kind == "reasoning" else "output_text"
            logprobs = {} if item.kind == "reasoning" else {"logprobs": list(item.logprobs)}
            events = [
                self._event(f"response.{kind}.done", **place, text=item.text, **logprobs),
                self._event("response.content_part.done", **place, part=item.part()),
            ]
        done = item.render(status)
        self.output.append(done)
        events.append(self._event("response.output_item.done", output_index=item.index, item=done))
        return events


def render(
    head: Head,
    asked: Asked,
    answer: Answer,
    names: TokenNames,
    on_done: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The response to a request that does not stream: the last event of the same stream."""
    renderer = EventRenderer(head, asked, names, on_done)
    renderer.opening()
    renderer.push(
        Delta(
            reasoning=answer.reasoning,
            text=answer.text,
            tool_calls=tuple(answer.tool_calls),
            logprobs=tuple(answer.logprobs),
            finish_reason="length" if answer.finish_reason == "length" else "stop",
            usage=answer.usage,
            num_reasoning=answer.num_reasoning,
            timings=answer.timings,
            images=answer.images,
            video_frames=answer.video_frames,
            regions=answer.regions,
        )
    )
    response: dict[str, Any] = renderer.closing()[-1]["response"]
    return response
