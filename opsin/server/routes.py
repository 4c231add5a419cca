"""The routes, each a few lines over a protocol's parse and render."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from opsin import __version__
from opsin.errors import NotFoundError
from opsin.server import completions, models, openai_chat, tokenize
from opsin.server.fields import Body, validated
from opsin.server.job import Job
from opsin.server.manager import Loaded, resident_memory
from opsin.server.request import Answer
from opsin.server.service import Service, head
from opsin.server.streams import JsonReply

router = APIRouter()


def service_of(http: HttpRequest) -> Service:
    """The service that the app's lifespan made."""
    service: Service = http.app.state.service
    return service


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry of a route with this body."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/chat/completions", include_in_schema=False)
@router.post("/v1/chat/completions", openapi_extra=takes(openai_chat.ChatBody))
async def chat_completions(http: HttpRequest) -> Response:
    """Answer a conversation."""
    service = service_of(http)
    request = openai_chat.parse(await service.body(http), service.bounds)
    if request.stream:
        return await service.streamed(
            http,
            [request],
            lambda loaded, job: openai_chat.ChunkRenderer(
                head("chatcmpl-", loaded), request, loaded.names
            ),
        )

    def render(loaded: Loaded, job: Job, answers: list[Answer]) -> dict[str, Any]:
        return openai_chat.render(head("chatcmpl-", loaded), answers, request, loaded.names)

    return await service.whole(http, [request], render)


@router.post("/completions", include_in_schema=False)
@router.post("/v1/completions", openapi_extra=takes(completions.CompletionBody))
async def text_completions(http: HttpRequest) -> Response:
    """Continue a text."""
    service = service_of(http)
    requests, echo = completions.parse(await service.body(http), service.bounds)

    def echoed(loaded: Loaded) -> list[str]:
        return [completions.echo(request, loaded.processor) if echo else "" for request in requests]

    if requests[0].stream:
        return await service.streamed(
            http,
            requests,
            lambda loaded, job: completions.ChunkRenderer(
                head("cmpl-", loaded), requests, loaded.names, echoed(loaded)
            ),
        )

    def render(loaded: Loaded, job: Job, answers: list[Answer]) -> dict[str, Any]:
        return completions.render(
            head("cmpl-", loaded), answers, requests, loaded.names, echoed(loaded)
        )

    return await service.whole(http, requests, render)


@router.post("/tokenize", openapi_extra=takes(tokenize.TokenizeBody))
async def tokenize_text(http: HttpRequest) -> Response:
    """Token ids of a text or a conversation."""
    service = service_of(http)
    fields = tokenize.parse(await service.body(http))
    reply = await service.with_model(
        http, fields.model, lambda loaded, _: tokenize.tokenize(fields, loaded)
    )
    return JsonReply(reply)


@router.post("/detokenize", openapi_extra=takes(tokenize.DetokenizeBody))
async def detokenize_ids(http: HttpRequest) -> Response:
    """The text of token ids."""
    service = service_of(http)
    fields = validated(tokenize.DetokenizeBody, await service.body(http))
    reply = await service.with_model(
        http, fields.model, lambda loaded, _: tokenize.detokenize(fields, loaded)
    )
    return JsonReply(reply)


@router.get("/models", include_in_schema=False)
@router.get("/v1/models")
async def list_models(http: HttpRequest) -> Response:
    """The models that a request may name."""
    manager = service_of(http).manager
    return JsonReply(models.render(manager))


@router.get("/v1/models/{name:path}")
async def one_model(http: HttpRequest, name: str) -> Response:
    """One model of the list."""
    listed = models.render(service_of(http).manager)["data"]
    for entry in listed:
        if entry["id"] == name:
            return JsonReply(entry)
    raise NotFoundError(
        f"Model {name[:200]} was not found",
        remedy="GET /v1/models lists those there are",
        param="model",
    )


class LoadBody(Body):
    """Which model to load."""

    model: Annotated[str, Field(min_length=1, max_length=512)]


class UnloadBody(Body):
    """Which model to unload; the one used last by default."""

    model: Annotated[str, Field(max_length=512)] = "default"


@router.post("/load", openapi_extra=takes(LoadBody))
async def load_model(http: HttpRequest) -> Response:
    """Load a model, downloading what is missing; the reply comes when it serves."""
    service = service_of(http)
    fields = validated(LoadBody, await service.body(http))
    loaded = service.manager.find(fields.model) or await service.manager.load(
        fields.model, download=service.settings.load_on_demand != "never"
    )
    return JsonReply({"status": "loaded", **models.entry(loaded.name, loaded.created, loaded)})


@router.post("/unload", openapi_extra=takes(UnloadBody))
async def unload_model(http: HttpRequest) -> Response:
    """Unload a model once its requests are done, and give its memory back."""
    service = service_of(http)
    fields = validated(UnloadBody, await service.body(http) or b"{}")
    before = resident_memory()
    name = await service.manager.unload(fields.model)
    return JsonReply(
        {"status": "unloaded", "id": name, "freed_bytes": max(0, before - resident_memory())}
    )


@router.get("/health")
async def health(http: HttpRequest) -> Response:
    """200 while every engine lives and takes steps when it has work."""
    ailment = service_of(http).heart.ailing()
    if ailment is None:
        return JsonReply({"status": "ok"})
    return JsonReply({"status": "failing", "why": ailment}, 503)


@router.get("/ready")
async def ready(http: HttpRequest) -> Response:
    """200 while new requests are taken: not before the first model is loaded, not when stopping."""
    service = service_of(http)
    is_ready = http.app.state.started and not service.draining
    status = "ready" if is_ready else "stopping" if service.draining else "loading"
    return JsonReply(
        {"status": status, "models": [model.name for model in service.manager.loaded]},
        200 if is_ready and service.heart.ailing() is None else 503,
    )


@router.get("/metrics")
async def metrics(http: HttpRequest) -> Response:
    """Counts and times, for Prometheus."""
    return Response(
        service_of(http).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


@router.get("/version")
async def version() -> Response:
    """The version of the server."""
    return JsonReply({"version": __version__})


BODIES: tuple[type[BaseModel], ...] = (
    openai_chat.ChatBody,
    completions.CompletionBody,
    tokenize.TokenizeBody,
    tokenize.DetokenizeBody,
    LoadBody,
    UnloadBody,
)
