"""From a request to prompts: fetching, decoding and tokenising, in bounded pools of threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from opsin.engine.form import AnswerForm, dialect_of, reasoning_tags, template_tool
from opsin.engine.processor import Processor
from opsin.errors import InputError, OpsinError
from opsin.families.base import Prompt
from opsin.media.cancellation import Cancellation
from opsin.prompt.documents import SOUND
from opsin.prompt.tasks import task_messages
from opsin.server.request import Request

T = TypeVar("T")

THINKING_SWITCHES = ("enable_thinking", "thinking", "thinking_mode", "reasoning_effort")

_log = logging.getLogger("opsin.server")


class Pools:
    """Threads that make prompts, those with media and those that compile grammars apart: neither a
    slow download nor a large schema holds up text.
    """

    def __init__(self, media_threads: int) -> None:
        self.text = ThreadPoolExecutor(2, "opsin-text")
        self.forms = ThreadPoolExecutor(2, "opsin-form")
        self.media = ThreadPoolExecutor(media_threads, "opsin-prepare")

    async def run(self, request: Request, work: Callable[[], T]) -> T:
        """`work()` in the pool that fits the request; cancelled before it starts, it never runs."""
        pool = self.media if request.has_media else self.text
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def form(self, processor: Processor, request: Request) -> AnswerForm:
        """The form of a request's answers, its grammar compiled."""
        work = partial(AnswerForm.of, processor, request.wanted, _own_template(request))
        if not request.wanted.has_grammar:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.forms, work)

    def close(self) -> None:
        """Let the threads go; what has not started is dropped."""
        for pool in (self.text, self.forms, self.media):
            pool.shutdown(wait=False, cancel_futures=True)


def prepare(
    processor: Processor, request: Request, vocabulary: int, cancellation: Cancellation
) -> Prompt:
    """The prompt of a request, ready for the engine; `vocabulary` is how many tokens there are."""
    prompt = _prepare(processor, request, vocabulary, cancellation)
    prompt.cache_salt = request.salt.encode()
    return prompt


def _prepare(
    processor: Processor, request: Request, vocabulary: int, cancellation: Cancellation
) -> Prompt:
    _check_tokens(request, vocabulary)
    if isinstance(request.prompt, str):
        return processor.assemble(request.prompt, [])
    if request.prompt is not None:
        return _from_ids(processor, request.prompt)
    _check_modalities(processor, request)
    _check_thinking(processor, request)
    messages = request.messages
    if request.task is not None:
        messages = task_messages(processor.family, request.task, messages)
    variables = dict(request.template)
    if request.wanted.offered:
        dialect_of(processor, request.wanted, _own_template(request))
        variables["tools"] = [template_tool(tool) for tool in request.wanted.offered]
    try:
        return processor.prepare(
            messages,
            options=request.processor,
            salt=request.salt.encode(),
            cancellation=cancellation,
            **variables,
        )
    except OpsinError:
        raise
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        # Values that only the family or its template can judge, such as text for a number.
        chosen = [
            name for name in ("processor_kwargs", "chat_template_kwargs") if name in _given(request)
        ]
        if not chosen:
            raise
        _log.info("A request could not be prepared.", exc_info=error)
        raise InputError(
            f"{' or '.join(chosen)} cannot be used",
            why="this model's preprocessing fails with it",
            remedy="Leave it out, or check its values",
            param=chosen[0],
        ) from None


def _check_modalities(processor: Processor, request: Request) -> None:
    """Refuse media that the model does not take, before any is fetched."""
    takes = processor.family.takes
    for message in request.messages:
        for media in message.media:
            if media.options.get(SOUND) and "audio" not in takes:
                raise InputError(
                    "This model does not hear the sound of a video",
                    why=f"{processor.config.model_type} takes {', '.join(('text', *takes))}",
                    remedy="Leave use_audio_in_video out",
                    param="use_audio_in_video",
                )
            if media.modality not in takes:
                raise InputError(
                    f"This model does not take {media.kind}",
                    why=f"{processor.config.model_type} takes {', '.join(('text', *takes))}",
                    remedy="Choose a model that does, or leave it out",
                    param="messages",
                )


def _given(request: Request) -> set[str]:
    found = {name for name in request.template if name == "chat_template_kwargs"}
    return found | ({"processor_kwargs"} if request.processor else set())


def _own_template(request: Request) -> str | None:
    """The chat template that a request brings, where it may."""
    template: str | None = request.template.get("chat_template")
    return template


def _check_tokens(request: Request, vocabulary: int) -> None:
    for name, ids in (
        ("logit_bias", request.sampling.logit_bias),
        ("stop_token_ids", request.sampling.stop_token_ids),
        ("prompt", request.prompt if isinstance(request.prompt, tuple) else ()),
    ):
        unknown = next((token for token in ids if token >= vocabulary), None)
        if unknown is not None:
            raise InputError(
                f"{name} names the token {unknown}",
                why=f"the model has {vocabulary} tokens",
                param=name,
            )


def _from_ids(processor: Processor, token_ids: tuple[int, ...]) -> Prompt:
    """A prompt of text tokens given as ids."""
    media = set(processor.media_token_ids.values())
    if not media.isdisjoint(token_ids):
        raise InputError(
            "prompt holds a token that stands for media",
            remedy="Send pictures to /v1/chat/completions",
            param="prompt",
        )
    return processor.of_tokens(list(token_ids))


def _check_thinking(processor: Processor, request: Request) -> None:
    """Refuse thinking where the model's template has no switch for it; off is what it is then."""
    variables = request.template.get("chat_template_kwargs") or {}
    effort = variables.get("reasoning_effort")
    asked = request.template.get("enable_thinking") or request.thinking_budget is not None
    template = processor.chat_template
    can = bool(reasoning_tags(processor)) or (
        template is not None and any(template.mentions(word) for word in THINKING_SWITCHES)
    )
    if can or not (asked or effort not in (None, "none")):
        return
    param = "reasoning_effort" if effort is not None else "enable_thinking"
    if request.thinking_budget is not None:
        param = "thinking_budget"
    raise InputError(
        f"{param} cannot be used",
        why="this model's chat template has no thinking to switch on",
        remedy="Leave it out, or choose a thinking model",
        param=param,
    )
