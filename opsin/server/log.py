"""The access log and the request ids: one JSON line a request, written when its reply has ended."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opsin.server.access import request_id
from opsin.server.failures import Failure, error_body
from opsin.server.metrics import Metrics
from opsin.server.streams import JsonReply

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_LEFT = 499

access_log = logging.getLogger("opsin.access")
_log = logging.getLogger("opsin.server")


def quiet_json(value: Any) -> str:
    """One line of JSON; ASCII alone, so that no control character reaches a terminal."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


class AccessLog:
    """The outermost ASGI middleware: gives ids, logs, counts, answers for what nothing caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and log it at its end."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        own = given if _ID.fullmatch(given) else secrets.token_hex(8)
        state = {**scope.get("state", {}), "request_id": own, "log": {}}
        scope["state"] = state
        started = time.perf_counter()
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", own.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception as error:
            _log.exception("Request %s failed.", own)
            if status:
                raise
            await _answer_failure(error, scope, receive, counted)
        finally:
            self._write(scope, status, time.perf_counter() - started)

    def _write(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        details = dict(state["log"])
        status = details.pop("status", status) or CLIENT_LEFT
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if status == CLIENT_LEFT:
            self.metrics.disconnects.inc()
        client = scope.get("client")
        line = {
            "time": round(time.time(), 3),
            "id": state["request_id"],
            "peer": client[0] if client else "",
            "key": state.get("key", ""),
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "ms": round(seconds * 1000, 1),
            **details,
        }
        access_log.info("%s", quiet_json(line))


async def _answer_failure(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    failure = Failure.of(error)
    body = error_body(scope["path"], failure, request_id(scope))
    await JsonReply(body, failure.status, failure.headers)(scope, receive, send)
