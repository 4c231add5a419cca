"""The routes of OpenAI's Responses, Anthropic's Messages and OpenAI's transcriptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from opsin.media.cancellation import Cancellation
from opsin.server import anthropic, audio, openai_responses, response_events
from opsin.server.failures import Failure, anthropic_error
from opsin.server.job import Job
from opsin.server.manager import Loaded
from opsin.server.multipart import parse_form
from opsin.server.openai_responses import Asked
from opsin.server.preparing import prepare
from opsin.server.request import Answer
from opsin.server.routes import service_of, takes
from opsin.server.service import Service, head
from opsin.server.streams import JsonReply, named_event

router = APIRouter()


def _key(http: HttpRequest) -> str:
    return str(http.scope["state"].get("key", ""))


@router.post("/responses", include_in_schema=False)
@router.post("/v1/responses", openapi_extra=takes(openai_responses.ResponseBody))
async def create_response(http: HttpRequest) -> Response:
    """Answer input items, after the conversation of an earlier response if one is named."""
    service = service_of(http)
    fields = openai_responses.read(await service.body(http))
    before: tuple[Any, ...] = ()
    if fields.previous_response_id is not None:
        before = service.responses.get(_key(http), fields.previous_response_id).items
    asked = openai_responses.parse(fields, before, service.bounds)
    keep = _keeper(service, _key(http), asked, before)
    if asked.request.stream:
        return await _stream_response(http, service, asked, keep)

    def render(loaded: Loaded, job: Job, answers: list[Answer]) -> dict[str, Any]:
        return response_events.render(head("resp_", loaded), asked, answers[0], loaded.names, keep)

    return await service.whole(http, [asked.request], render)


def _keeper(
    service: Service, key: str, asked: Asked, before: tuple[Any, ...]
) -> Callable[[dict[str, Any]], None]:
    """What stores a finished response, unless it is not to be kept."""

    def keep(response: dict[str, Any]) -> None:
        if asked.stores:
            service.responses.put(key, response, before, asked.given, response["output"])

    return keep


async def _stream_response(
    http: HttpRequest, service: Service, asked: Asked, keep: Callable[[dict[str, Any]], None]
) -> Response:
    made: list[response_events.EventRenderer] = []

    def make(loaded: Loaded, job: Job) -> response_events.EventRenderer:
        made.append(response_events.EventRenderer(head("resp_", loaded), asked, loaded.names, keep))
        return made[0]

    def error_line(failure: Failure) -> bytes:
        return named_event(
            {
                "type": "error",
                "sequence_number": made[0].sequence if made else 0,
                "code": failure.code,
                "message": failure.message,
                "param": failure.param,
            }
        )

    return await service.streamed(
        http, [asked.request], make, line=named_event, end=b"", error_line=error_line
    )


@router.get("/v1/responses/{name}")
async def get_response(http: HttpRequest, name: str) -> Response:
    """A stored response."""
    return JsonReply(service_of(http).responses.get(_key(http), name).response)


@router.delete("/v1/responses/{name}")
async def delete_response(http: HttpRequest, name: str) -> Response:
    """Forget a stored response."""
    service_of(http).responses.delete(_key(http), name)
    return JsonReply({"id": name, "object": "response", "deleted": True})


@router.get("/v1/responses/{name}/input_items")
async def response_input(http: HttpRequest, name: str) -> Response:
    """The items that a stored response answered, the newest first."""
    stored = service_of(http).responses.get(_key(http), name)
    items = list(stored.items[stored.first : stored.last])[::-1]
    return JsonReply({"object": "list", "data": items, "has_more": False})


@router.post("/v1/messages", openapi_extra=takes(anthropic.MessageBody))
async def create_message(http: HttpRequest) -> Response:
    """Answer a conversation as Anthropic's clients hold it."""
    service = service_of(http)
    request = anthropic.parse(await service.body(http), service.bounds)
    if not request.stream:
        return await service.whole(
            http,
            [request],
            lambda loaded, job, answers: anthropic.render(head("msg_", loaded), answers[0]),
        )
    return await service.streamed(
        http,
        [request],
        lambda loaded, job: anthropic.EventRenderer(
            head("msg_", loaded), len(job.prompts[0].text_ids)
        ),
        line=named_event,
        end=b"",
        error_line=lambda failure: named_event(anthropic_error(failure)),
    )


@router.post("/v1/messages/count_tokens", openapi_extra=takes(anthropic.CountBody))
async def count_tokens(http: HttpRequest) -> Response:
    """The tokens of a prompt, media included."""
    service = service_of(http)
    request = anthropic.parse_count(await service.body(http), service.bounds)

    def count(loaded: Loaded, cancellation: Cancellation) -> int:
        size = loaded.model.decoder.config.vocab_size
        return len(prepare(loaded.processor, request, size, cancellation).text_ids)

    tokens = await service.with_model(http, request.model, count, media=request.has_media)
    return JsonReply({"input_tokens": tokens})


FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "model": {"type": "string"},
                        "language": {"type": "string"},
                        "prompt": {"type": "string"},
                        "response_format": {"type": "string", "enum": list(audio.FORMATS)},
                        "timestamp_granularities[]": {"type": "array", "items": {"type": "string"}},
                        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
                        "stream": {"type": "boolean"},
                    },
                }
            }
        },
    }
}


@router.post("/v1/audio/transcriptions", openapi_extra=FORM)
async def transcribe(http: HttpRequest) -> Response:
    """Write down what a sound says, with a model that hears."""
    service = service_of(http)
    body = await service.body(http)
    parts = parse_form(http.headers.get("content-type", ""), body)
    asked = audio.parse(parts, service.bounds.max_tokens)
    plan = await service.with_model(
        http,
        asked.model,
        lambda loaded, cancellation: asked.plan(loaded.processor, cancellation),
        media=True,
    )
    if asked.stream:
        return await service.streamed(
            http, plan.requests, lambda loaded, job: audio.EventRenderer(len(plan.pieces))
        )
    reply = await service.whole(
        http, plan.requests, lambda loaded, job, answers: plan.render(answers)
    )
    kind = audio.MEDIA_TYPES.get(asked.response_format)
    if kind is None:
        return reply
    return PlainTextResponse(json.loads(bytes(reply.body))["text"], media_type=kind)


BODIES: tuple[type[BaseModel], ...] = (
    openai_responses.ResponseBody,
    anthropic.MessageBody,
    anthropic.CountBody,
)
