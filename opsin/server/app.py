"""Makes the application: routes, access, errors, and the service that lives as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from opsin import __version__
from opsin.errors import OpsinError
from opsin.server import routes, vendor_routes
from opsin.server.access import Access, Gate
from opsin.server.failures import Refused
from opsin.server.log import CLIENT_LEFT, AccessLog
from opsin.server.manager import Manager
from opsin.server.metrics import Metrics
from opsin.server.service import Service, error_reply
from opsin.server.settings import ServeSettings
from opsin.server.streams import ClientGone

_log = logging.getLogger("opsin.server")


def create_app(
    settings: ServeSettings, on_preload_failure: Callable[[OpsinError], None] | None = None
) -> FastAPI:
    """The application that a server's settings describe.

    The model of --model is loaded in the background once the app has started; what then goes wrong
    is given to `on_preload_failure`, and raised if there is none.
    """
    access = Access(settings.keys(), settings.cors_origin, settings.allowed_host)
    metrics = Metrics(lambda: _engine_stats(app))

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        manager = Manager(settings, lambda result: metrics.loads.labels(result).inc())
        app.state.service = service = Service(settings, metrics, manager)
        app.state.started = settings.model is None
        preload = asyncio.ensure_future(_preload(app, manager, on_preload_failure))
        try:
            yield
        finally:
            preload.cancel()
            await asyncio.wait({preload})
            await service.close()

    app = FastAPI(
        title="Opsin",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.include_router(routes.router)
    app.include_router(vendor_routes.router)
    app.add_exception_handler(OpsinError, _opsin_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientGone, _client_gone)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]
    app.add_middleware(Gate, access=access)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origin),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(AccessLog, metrics=metrics)
    return app


async def _preload(
    app: FastAPI, manager: Manager, on_failure: Callable[[OpsinError], None] | None
) -> None:
    if manager.settings.model is None:
        return
    try:
        await manager.load("default")
    except OpsinError as error:
        if on_failure is None:
            raise
        on_failure(error)
        return
    app.state.started = True


def _engine_stats(app: FastAPI) -> dict[str, dict[str, Any]]:
    return {model.name: model.engine.stats() for model in app.state.service.manager.loaded}


async def _opsin_error(http: HttpRequest, error: Exception) -> Response:
    return error_reply(http, error)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """No such route, or not with this method."""
    assert isinstance(error, HTTPException)
    words = {
        404: ("route_not_found", "There is no such route", "GET /openapi.json lists the routes"),
        405: ("method_not_allowed", "This route does not take this method", ""),
    }
    code, what, remedy = words.get(error.status_code, ("invalid_request", "Refused", ""))
    reply = error_reply(http, Refused(error.status_code, code, what, remedy=remedy))
    reply.headers.update(error.headers or {})
    return reply


async def _client_gone(http: HttpRequest, error: Exception) -> Response:
    """Nobody reads this reply; the log says why there is none."""
    http.scope["state"]["log"]["status"] = CLIENT_LEFT
    return Response(status_code=400)


def openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies' schemas."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas: dict[str, Any] = {}
        for kind in (*routes.BODIES, *vendor_routes.BODIES):
            schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= schema.pop("$defs", {})
            schemas[kind.__name__] = schema
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
        app.openapi_schema = document
    return app.openapi_schema
