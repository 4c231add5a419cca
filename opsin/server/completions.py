"""OpenAI's older text completions: a prompt as it stands, continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from opsin.engine.form import Wanted
from opsin.engine.processor import Processor
from opsin.errors import InputError
from opsin.prompt.token_bytes import TokenNames
from opsin.server import openai_chat
from opsin.server.bounds import Bounds
from opsin.server.fields import (
    MAX_STOPS,
    Count,
    FormFields,
    SamplingFields,
    StopText,
    TokenId,
    constraint,
    sampling,
    validated,
)
from opsin.server.request import Answer, Delta, Head, Request, Totals
from opsin.types import TokenLogprob

MAX_PROMPTS = 128


class CompletionBody(SamplingFields, FormFields, openai_chat.HarmlessFields):
    """The body of a text completion."""

    model: Annotated[str, Field(max_length=512)] = "default"
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_PROMPTS),
        ]
    )
    max_tokens: Count | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: openai_chat.StreamOptions | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None


def parse(body: bytes, bounds: Bounds) -> tuple[list[Request], bool]:
    """One request for each prompt, and whether prompts are echoed."""
    fields = validated(CompletionBody, body)
    n = fields.n or 1
    if fields.best_of not in (None, n):
        raise InputError("best_of must be n", remedy="Leave it out", param="best_of")
    if fields.echo and fields.logprobs is not None:
        raise InputError(
            "echo and logprobs cannot be used together",
            why="log probabilities of a prompt are not computed",
            param="echo",
        )
    if fields.stream_options is not None and not fields.stream:
        raise InputError("stream_options needs stream", param="stream_options")
    prompts = prompts_of(fields.prompt)
    bounds.check_answers(n)
    if n * len(prompts) > MAX_PROMPTS:
        raise InputError(
            f"{len(prompts)} prompts with {n} answers each are too many",
            why=f"one request gets at most {MAX_PROMPTS} answers",
            param="prompt",
        )
    shared = Request(
        model=fields.model,
        sampling=sampling(
            fields,
            max_tokens=fields.max_tokens or bounds.max_tokens,
            stop=fields.stop,
            logprobs=fields.logprobs,
        ),
        n=n,
        wanted=Wanted(constraint=constraint(fields), is_chat=False),
        salt=fields.cache_salt or "",
        stream=bool(fields.stream),
        include_usage=bool(fields.stream_options and fields.stream_options.include_usage),
    )
    return [replace(shared, prompt=prompt) for prompt in prompts], bool(fields.echo)


def prompts_of(
    prompt: str | list[str] | list[int] | list[list[int]],
) -> list[str | tuple[int, ...]]:
    """One prompt or several, each as text or as token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(item, int) for item in prompt):
        return [tuple(item for item in prompt if isinstance(item, int))]
    return [item if isinstance(item, str) else tuple(item) for item in prompt]  # type: ignore[arg-type]


def echo(request: Request, processor: Processor) -> str:
    """A prompt's text, for the answer to start with."""
    if isinstance(request.prompt, str):
        return request.prompt
    return processor.tokenizer.decode(request.prompt or (), skip_special_tokens=False)


def render(
    head: Head,
    answers: Sequence[Answer],
    requests: Sequence[Request],
    names: TokenNames,
    echoed: Sequence[str],
) -> dict[str, Any]:
    """The reply; `echoed` is each prompt's text, "" where it is not wanted."""
    n = requests[0].n
    choices = []
    for i, answer in enumerate(answers):
        wanted = requests[0].sampling.logprobs is not None
        choices.append(
            {
                "index": i,
                "text": echoed[i // n] + answer.text,
                "logprobs": _logprobs(answer.logprobs, names, 0) if wanted else None,
                "finish_reason": answer.finish_reason,
            }
        )
    return {
        **_shell(head),
        "choices": choices,
        "usage": openai_chat.usage(total(answers, n)),
        "timings": openai_chat.timings(answers[0].timings),
    }


def total(answers: Sequence[Answer], n: int) -> Totals:
    """Token counts over all prompts, each prompt counted once."""
    groups = [Totals.of(list(answers[i : i + n])) for i in range(0, len(answers), n)]
    return Totals(
        sum(group.prompt for group in groups),
        sum(group.generated for group in groups),
        sum(group.cached for group in groups),
        drafted=sum(group.drafted for group in groups),
        accepted=sum(group.accepted for group in groups),
    )


def _shell(head: Head) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
    }


def _logprobs(values: Sequence[TokenLogprob], names: TokenNames, offset: int) -> dict[str, Any]:
    texts = [names.data(value.token_id).decode("utf-8", "replace") for value in values]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(value.logprob, -9999.0) for value in values],
        "top_logprobs": [
            {names.data(t).decode("utf-8", "replace"): max(lp, -9999.0) for t, lp in value.top}
            for value in values
        ],
        "text_offset": offsets,
    }


class ChunkRenderer:
    """Deltas to the chunks of one stream; a delta's index counts over all prompts' answers."""

    def __init__(
        self,
        head: Head,
        requests: Sequence[Request],
        names: TokenNames,
        echoed: Sequence[str],
    ) -> None:
        self.head = head
        self.request = requests[0]
        self.names = names
        self.answers = [Answer() for _ in range(len(requests) * requests[0].n)]
        self.offsets = [0 for _ in self.answers]
        self.echoed = [echoed[i // requests[0].n] for i in range(len(self.answers))]

    def opening(self) -> list[dict[str, Any]]:
        """The prompts, where they are echoed."""
        return [self._chunk(i, text) for i, text in enumerate(self.echoed) if text]

    def push(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunk that a delta makes, if it says anything."""
        if delta.finish_reason is not None:
            self.answers[delta.index].usage = delta.usage or self.answers[delta.index].usage
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return []
        chunk = self._chunk(delta.index, delta.text, delta.finish_reason)
        if self.request.sampling.logprobs is not None:
            held = _logprobs(delta.logprobs, self.names, self.offsets[delta.index])
            self.offsets[delta.index] += sum(len(text) for text in held["tokens"])
            chunk["choices"][0]["logprobs"] = held
        return [chunk]

    def closing(self) -> list[dict[str, Any]]:
        """The chunk with the usage, if it was asked for."""
        if not self.request.include_usage:
            return []
        counts = openai_chat.usage(total(self.answers, self.request.n))
        return [{**_shell(self.head), "choices": [], "usage": counts}]

    def _chunk(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        return {**_shell(self.head), "choices": [choice]}
