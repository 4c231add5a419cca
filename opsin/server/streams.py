"""Replies over HTTP: one JSON document or server-sent events, ended when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from opsin.server.failures import TimedOut

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before the reply was there."""


class JsonReply(Response):
    """A JSON document; numbers that JSON lacks never get this far."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The document's bytes."""
        return as_json(content)


_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def as_json(value: Any) -> bytes:
    """JSON without spaces, non-ASCII as it stands; half characters are replaced."""
    return _JSON.encode(value).encode("utf-8", "replace")


def data_line(value: Any) -> bytes:
    """A server-sent event without a name."""
    return b"data: " + as_json(value) + b"\n\n"


def named_event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event with the name that its type is."""
    return f"event: {value['type']}\n".encode() + data_line(value)


DONE = b"data: [DONE]\n\n"


async def disconnected(http: HttpRequest) -> None:
    """Returns once the client has left; the body must have been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def while_connected(http: HttpRequest, work: Awaitable[T], seconds: float) -> T:
    """The result of the work, which ends when the client leaves or its time is over.

    Raises ClientGone or TimedOut.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(disconnected(http))
    try:
        await asyncio.wait({task, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if leaving.done():
            raise ClientGone
        raise timed_out(seconds)
    finally:
        leaving.cancel()
        task.cancel()
        await asyncio.wait({task, leaving})


def timed_out(seconds: float) -> TimedOut:
    """The error for a request that outlived the server's --timeout."""
    return TimedOut(
        "The request took too long",
        why=f"it was not done after {seconds:g} seconds",
        remedy="Ask for less, or start the server with a higher --timeout",
    )


class EventStream(Response):
    """A reply that sends what an iterator gives, until the client leaves.

    The iterator is always closed, which is what ends the work behind it. An exception of the
    iterator becomes a last event, made by `on_error`.
    """

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        on_error: Callable[[BaseException], bytes],
        on_gone: Callable[[], None],
        deadline: float,
    ) -> None:
        super().__init__()
        self.chunks = chunks
        self.on_error = on_error
        self.on_gone = on_gone
        self.deadline = deadline  # of the loop's clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sending = asyncio.ensure_future(self._send(send))
        leaving = asyncio.ensure_future(disconnected(HttpRequest(scope, receive)))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
            else:
                self.on_gone()
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.wait({sending, leaving})

    async def _send(self, send: Send) -> None:
        try:
            try:
                async with asyncio.timeout_at(self.deadline):
                    async for chunk in self.chunks:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
            finally:
                await _close(self.chunks)
        except Exception as error:  # noqa: BLE001  the status is sent: the stream must say it
            last = self.on_error(error)
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _close(chunks: AsyncIterator[bytes]) -> None:
    close = getattr(chunks, "aclose", None)
    if close is not None:
        await close()
