"""OpenAI's chat completions: a body to a request, deltas to chunks or to one reply."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from opsin.engine.asked import parse_tool, parse_tool_choice
from opsin.engine.form import Wanted
from opsin.errors import InputError
from opsin.prompt.token_bytes import TokenNames
from opsin.server.bounds import Bounds
from opsin.server.conversation import conversation
from opsin.server.fields import (
    MAX_MESSAGES,
    MAX_STOPS,
    MAX_TOOLS,
    Body,
    Count,
    FormFields,
    JsonObject,
    PromptFields,
    SamplingFields,
    StopText,
    constraint,
    processor_fields,
    sampling,
    template_fields,
    validated,
    video_fields,
)
from opsin.server.request import Answer, Delta, Head, Request, Totals
from opsin.types import Timings, TokenLogprob, ToolCall


class StreamOptions(Body):
    """What a stream reports beside the answer; obfuscation is padding that nothing here sends."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class HarmlessFields(Body):
    """Fields that clients send for their vendor's own book-keeping, and hints that only models
    trained for them heed; they change no answer.
    """

    user: str | None = None
    metadata: JsonObject | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: JsonObject | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ChatBody(SamplingFields, PromptFields, FormFields, HarmlessFields):
    """The body of a chat completion."""

    model: Annotated[str, Field(max_length=512)] = "default"
    messages: Annotated[list[JsonObject], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[JsonObject], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )


def parse(body: bytes, bounds: Bounds) -> Request:
    """The request that a body makes; InputError names the field that is wrong."""
    fields = validated(ChatBody, body)
    if fields.stream_options is not None and not fields.stream:
        raise InputError("stream_options needs stream", param="stream_options")
    tools = tuple(parse_tool(tool, f"tools[{i}]") for i, tool in enumerate(fields.tools or ()))
    length = fields.max_completion_tokens or fields.max_tokens or bounds.max_tokens
    request = Request(
        model=fields.model,
        messages=conversation(fields.messages, video_fields(fields)),
        sampling=sampling(fields, max_tokens=length, stop=fields.stop, logprobs=_logprobs(fields)),
        n=bounds.check_answers(fields.n or 1),
        template=template_fields(fields, fields.reasoning_effort),
        processor=processor_fields(fields),
        wanted=Wanted(
            tools,
            parse_tool_choice(fields.tool_choice, tools),
            fields.parallel_tool_calls is not False,
            constraint(fields),
        ),
        thinking_budget=fields.thinking_budget,
        task=fields.task,
        salt=fields.cache_salt or "",
        stream=bool(fields.stream),
        include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
    )
    check(request, bounds)
    return request


def check(request: Request, bounds: Bounds) -> None:
    """What every protocol's request is held to."""
    bounds.check_media(request.messages)
    bounds.check_template(request.template)
    bounds.check_processor(request.processor)


def _logprobs(fields: ChatBody) -> int | None:
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InputError("top_logprobs needs logprobs", param="top_logprobs")
    return (fields.top_logprobs or 0) if fields.logprobs else None


# Replies.


def finish_reason(answer: Answer | Delta) -> str | None:
    """Why an answer ended, in OpenAI's words."""
    return answer.finish_reason


def usage(totals: Totals) -> dict[str, Any]:
    """Token counts; the cached and media tokens are part of the prompt's.

    Where guesses at tokens were computed, those that were right and wrong are told.
    """
    details = {"reasoning_tokens": totals.reasoning}
    if totals.drafted:
        details["accepted_prediction_tokens"] = totals.accepted
        details["rejected_prediction_tokens"] = totals.drafted - totals.accepted
    return {
        "prompt_tokens": totals.prompt,
        "completion_tokens": totals.generated,
        "total_tokens": totals.prompt + totals.generated,
        "prompt_tokens_details": {
            "cached_tokens": totals.cached,
            "image_tokens": totals.image,
            "audio_tokens": totals.audio,
            "video_tokens": totals.video,
        },
        "completion_tokens_details": details,
    }


def timings(value: Timings) -> dict[str, float]:
    """Seconds by stage."""
    return {name: round(seconds, 6) for name, seconds in dataclasses.asdict(value).items()}


def video_frames(answer: Answer | Delta) -> dict[str, list[int]]:
    """How many frames of each video were looked at, where there are videos."""
    return {"video_frames": list(answer.video_frames)} if answer.video_frames else {}


def images(answer: Answer | Delta) -> list[dict[str, int]]:
    """Each picture's own size, the size it was processed at, and its tokens."""
    return [dataclasses.asdict(image) for image in answer.images]


def logprobs(values: Sequence[TokenLogprob], names: TokenNames) -> dict[str, Any]:
    """Log probabilities with each token's text and bytes."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = names.data(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(data)}

    content = [
        {**entry(v.token_id, v.logprob), "top_logprobs": [entry(t, lp) for t, lp in v.top]}
        for v in values
    ]
    return {"content": content, "refusal": None}


def tool_calls(calls: Sequence[ToolCall], *, streamed: bool) -> list[dict[str, Any]]:
    """Tool calls, whole or in pieces; only pieces carry an index."""
    made = []
    for call in calls:
        function: dict[str, Any] = {"arguments": call.arguments}
        if call.name or not streamed:
            function = {"name": call.name, "arguments": call.arguments}
        entry: dict[str, Any] = {"index": call.index} if streamed else {}
        if call.id or not streamed:
            entry |= {"id": call.id, "type": "function"}
        made.append({**entry, "function": function})
    return made


def render(
    head: Head, answers: Sequence[Answer], request: Request, names: TokenNames
) -> dict[str, Any]:
    """The reply to a request that does not stream."""
    choices = [_choice(i, answer, request, names) for i, answer in enumerate(answers)]
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": usage(Totals.of(list(answers))),
        "timings": timings(answers[0].timings),
        "images": images(answers[0]),
        **video_frames(answers[0]),
    }


def _choice(index: int, answer: Answer, request: Request, names: TokenNames) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["content"] = answer.text or None
        message["tool_calls"] = tool_calls(answer.tool_calls, streamed=False)
    wanted = request.sampling.logprobs is not None
    regions = {"regions": list(answer.regions)} if answer.regions else {}
    return {
        **regions,
        "index": index,
        "message": message,
        "logprobs": logprobs(answer.logprobs, names) if wanted else None,
        "finish_reason": finish_reason(answer),
    }


class ChunkRenderer:
    """Deltas to the chunks of one stream."""

    def __init__(self, head: Head, request: Request, names: TokenNames) -> None:
        self.head = head
        self.request = request
        self.names = names
        self.totals = [Answer() for _ in range(request.n)]

    def opening(self) -> list[dict[str, Any]]:
        """The first chunk of each answer, which only says whose it is."""
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self.request.n)]

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks that a delta makes."""
        content: dict[str, Any] = {}
        if delta.reasoning:
            content["reasoning_content"] = delta.reasoning
        if delta.text:
            content["content"] = delta.text
        if delta.tool_calls:
            content["tool_calls"] = tool_calls(delta.tool_calls, streamed=True)
        chunks = []
        if content or delta.logprobs:
            chunk = self._chunk(delta.index, content)
            if self.request.sampling.logprobs is not None:
                chunk["choices"][0]["logprobs"] = logprobs(delta.logprobs, self.names)
            chunks.append(chunk)
        total = self.totals[delta.index]
        total.num_reasoning += delta.num_reasoning
        if delta.finish_reason is not None:
            total.usage = delta.usage or total.usage
            last = self._chunk(delta.index, {}, finish_reason(delta))
            last["timings"] = timings(delta.timings or Timings())
            last["images"] = images(delta)
            last.update(video_frames(delta))
            if delta.regions:
                last["choices"][0]["regions"] = list(delta.regions)
            chunks.append(last)
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        """The chunk with the usage, if it was asked for."""
        if not self.request.include_usage:
            return []
        return [{**self._shell(), "choices": [], "usage": usage(Totals.of(self.totals))}]

    def _shell(self) -> dict[str, Any]:
        return {
            "id": self.head.id,
            "object": "chat.completion.chunk",
            "created": self.head.created,
            "model": self.head.model,
        }

    def _chunk(
        self, index: int, content: Mapping[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": content, "logprobs": None, "finish_reason": reason}
        chunk = {**self._shell(), "choices": [choice]}
        return {**chunk, "usage": None} if self.request.include_usage else chunk
