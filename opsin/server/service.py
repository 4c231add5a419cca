"""What every route shares: reading a body, taking a model, running a job, sending its reply."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from opsin.errors import EngineError
from opsin.media.cancellation import Cancellation
from opsin.server.bounds import Bounds
from opsin.server.courier import Courier
from opsin.server.failures import BodyTooLarge, Failure, Refused, error_body
from opsin.server.health import Heart
from opsin.server.job import Admission, Job, Workshop
from opsin.server.log import CLIENT_LEFT
from opsin.server.manager import Loaded, Manager
from opsin.server.metrics import Metrics
from opsin.server.preparing import Pools
from opsin.server.request import Answer, Delta, Head, Request
from opsin.server.settings import ServeSettings
from opsin.server.stored import ResponseStore
from opsin.server.streams import (
    DONE,
    ClientGone,
    EventStream,
    JsonReply,
    data_line,
    timed_out,
    while_connected,
)

T = TypeVar("T")
BODY_SECONDS = 60.0

_log = logging.getLogger("opsin.server")


class Renderer(Protocol):
    """What turns the deltas of one reply into its events."""

    def opening(self) -> list[dict[str, Any]]: ...

    def push(self, delta: Delta) -> list[dict[str, Any]]: ...

    def closing(self) -> list[dict[str, Any]]: ...


class Service:
    """One server: its settings, models, pools and counts. Made inside the event loop."""

    def __init__(self, settings: ServeSettings, metrics: Metrics, manager: Manager) -> None:
        self.settings = settings
        self.bounds = Bounds.of(settings)
        self.metrics = metrics
        self.manager = manager
        self.heart = Heart(manager)
        self.responses = ResponseStore(settings.max_stored)
        self.draining = False
        self.shop = Workshop(
            Pools(settings.media_threads),
            Courier(asyncio.get_running_loop()),
            Admission(settings.max_num_seqs + settings.max_queue),
            metrics,
        )

    async def close(self) -> None:
        """End what runs and free the models."""
        self.draining = True
        await self.manager.close()
        self.shop.pools.close()

    async def body(self, http: HttpRequest) -> bytes:
        """A request's body, refused as soon as it is over the limit or comes too slowly."""
        limit = self.settings.max_body_bytes
        stated = http.headers.get("content-length", "0")
        if not stated.isdigit() or int(stated) > limit:
            raise too_large(limit)
        parts = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in http.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large(limit)
                    parts.append(part)
        except TimeoutError:
            raise Refused(
                408, "body_timeout", "The body took too long", why=f"over {BODY_SECONDS:g} s"
            ) from None
        except ClientDisconnect:
            raise ClientGone from None
        return b"".join(parts)

    def keyed(self, http: HttpRequest, request: Request) -> Request:
        """The request with its caches bound to the key that sent it."""
        key = http.scope["state"].get("key", "")
        return replace(request, salt=f"{key}:{request.salt}" if key or request.salt else "")

    async def whole(
        self,
        http: HttpRequest,
        requests: Sequence[Request],
        render: Callable[[Loaded, Job, list[Answer]], dict[str, Any]],
    ) -> Response:
        """A reply that comes in one piece."""
        self._refuse_when_draining()
        requests = [self.keyed(http, request) for request in requests]

        async def work() -> dict[str, Any]:
            async with (
                self.manager.lease(requests[0].model) as loaded,
                Job(self.shop, loaded, requests, whole=True) as job,
            ):
                answers = await job.answers()
                self.note(http, loaded, job)
                return render(loaded, job, answers)

        return JsonReply(await self.connected(http, work()))

    async def streamed(
        self,
        http: HttpRequest,
        requests: Sequence[Request],
        renderer: Callable[[Loaded, Job], Renderer],
        *,
        line: Callable[[Any], bytes] = data_line,
        end: bytes = DONE,
        error_line: Callable[[Failure], bytes] | None = None,
    ) -> Response:
        """A reply as server-sent events; what fails before the first event has its own status."""
        self._refuse_when_draining()
        requests = [self.keyed(http, request) for request in requests]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.timeout
        chunks = self._chunks(http, requests, renderer, line, end)
        try:
            first = await self.connected(http, anext(chunks))
        except BaseException:
            await chunks.aclose()
            raise

        async def all_chunks() -> AsyncIterator[bytes]:
            try:
                yield first
                async for chunk in chunks:
                    yield chunk
            finally:
                await chunks.aclose()

        def on_error(error: BaseException) -> bytes:
            failure = Failure.of(self._explained(error))
            http.scope["state"]["log"]["status"] = failure.status
            if error_line is not None:
                return error_line(failure)
            return data_line(error_body(http.url.path, failure)) + end

        def on_gone() -> None:
            http.scope["state"]["log"]["status"] = CLIENT_LEFT

        return EventStream(all_chunks(), on_error, on_gone, deadline)

    def _explained(self, error: BaseException) -> BaseException:
        """The error that a reply states for one that ended its stream."""
        if isinstance(error, TimeoutError):
            return timed_out(self.settings.timeout)
        if Failure.of(error).code == "internal_error":
            _log.error("A stream failed.", exc_info=error)
        return error

    async def _chunks(
        self,
        http: HttpRequest,
        requests: Sequence[Request],
        make: Callable[[Loaded, Job], Renderer],
        line: Callable[[Any], bytes],
        end: bytes,
    ) -> AsyncGenerator[bytes, None]:
        """A stream's bytes: all events that are there at once go out in one piece."""
        async with (
            self.manager.lease(requests[0].model) as loaded,
            Job(self.shop, loaded, requests) as job,
        ):
            renderer = make(loaded, job)
            events = renderer.opening()
            async for deltas in job.batches():
                for delta in deltas:
                    events += renderer.push(delta)
                if events:
                    yield b"".join([line(event) for event in events])
                events = []
            self.note(http, loaded, job)
            yield b"".join([line(event) for event in renderer.closing()]) + end

    async def connected(self, http: HttpRequest, work: Awaitable[T]) -> T:
        """The result of the work, while the client is there and within --timeout."""
        return await while_connected(http, work, self.settings.timeout)

    async def with_model(
        self,
        http: HttpRequest,
        model: str,
        work: Callable[[Loaded, Cancellation], T],
        *,
        media: bool = False,
    ) -> T:
        """The result of `work(model, cancellation)` in a pool; a client that leaves cancels it."""
        self._refuse_when_draining()
        pool = self.shop.pools.media if media else self.shop.pools.text
        cancellation = Cancellation()

        async def run() -> T:
            async with self.manager.lease(model) as loaded:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(pool, work, loaded, cancellation)

        self.shop.admission.enter(1)
        try:
            return await self.connected(http, run())
        finally:
            cancellation.cancel()
            self.shop.admission.leave(1)

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise EngineError("The server is stopping", remedy="Try again later")

    def note(self, http: HttpRequest, loaded: Loaded, job: Job) -> None:
        """Put a reply's model and tokens into the access log."""
        http.scope["state"]["log"].update(
            model=loaded.name,
            prompt_tokens=job.usage.prompt_tokens,
            generated_tokens=job.usage.generation_tokens,
        )


def too_large(limit: int) -> BodyTooLarge:
    """The error for a body over the limit."""
    return BodyTooLarge(
        "The body is too large",
        why=f"the limit is {limit:,} bytes",
        remedy="Send less, name media by URL, or start the server with a higher --max-body-bytes",
    )


def head(prefix: str, loaded: Loaded) -> Head:
    """A new reply's id, time and model."""
    return Head(f"{prefix}{secrets.token_hex(12)}", int(time.time()), loaded.name)


def error_reply(http: HttpRequest, error: Exception) -> Response:
    """An error as the reply of a route."""
    failure = Failure.of(error)
    state: Mapping[str, Any] = http.scope["state"]
    body = error_body(http.url.path, failure, str(state.get("request_id", "")))
    return JsonReply(body, failure.status, failure.headers)
