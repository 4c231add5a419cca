"""Runs the application: listens, drains at the first signal, aborts at the second."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from types import FrameType
from typing import Any

import uvicorn

from opsin.errors import EngineError, OpsinError
from opsin.server.app import create_app
from opsin.server.settings import ServeSettings

ABORTED = 143  # what a shell reports of a process that SIGTERM ended


class Server(uvicorn.Server):
    """A server whose first signal ends listening and drains, and whose second ends it at once."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.failure: OpsinError | None = None
        self.port = settings.port
        self.app = create_app(settings, self._preload_failed)
        config = uvicorn.Config(
            self.app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # a forwarded address is a claim, and access depends on it
            ws="none",
            lifespan="on",
            timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
            timeout_keep_alive=75,
        )
        super().__init__(config)

    def _preload_failed(self, error: OpsinError) -> None:
        self.failure = error
        self.should_exit = True

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Listen, and say where and to whom."""
        await super().startup(sockets)
        if self.started:
            self.port = self.servers[0].sockets[0].getsockname()[1]
            sys.stderr.write(self.message() + "\n")
            sys.stderr.flush()

    def message(self) -> str:
        """What the server says when it listens: the model, the address, and who is served."""
        settings = self.settings
        host = settings.host if ":" not in settings.host else f"[{settings.host}]"
        where = f"http://{host}:{self.port}"
        lines = [f"opsin: serving {settings.model or 'bundled'} at {where}/v1"]
        if settings.api_key:
            lines.append("opsin: access: every client with an API key")
        else:
            lines.append(
                "opsin: access: only clients on this machine; "
                "to serve others, start with --api-key KEY"
            )
        if settings.max_kv_size is not None:
            lines.append(
                f"opsin: of more than {settings.max_kv_size} tokens of a request only the first 4 "
                f"and the last {settings.max_kv_size - 4} are seen"
            )
        roots = ", ".join(settings.media_root) or "none"
        lines.append(f"opsin: local files that requests may name: {roots}")
        return "\n".join(lines)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, any further one aborts."""
        del sig, frame
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        if self.started:
            self.app.state.service.draining = True


def serve(settings: ServeSettings) -> None:
    """Serve until a signal; returns once all is drained. Raises what kept it from serving."""
    log_to_stderr(settings.log_level)
    server = Server(settings)
    try:
        asyncio.run(server.serve())
    except SystemExit:
        raise EngineError(
            f"The server cannot listen on {settings.host} port {settings.port}",
            why="the address is taken or not this machine's",
            remedy="Choose another with --port or --host",
            param="port",
        ) from None
    if server.failure is not None:
        raise server.failure
    if server.force_exit:
        # Threads may be deep in a download or a step; the operator asked not to wait for them.
        sys.stderr.write("opsin: aborted\n")
        logging.shutdown()
        sys.stderr.flush()
        os._exit(ABORTED)


def log_to_stderr(level: str) -> None:
    """Log lines of the server and its access log on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    plain = logging.StreamHandler()
    plain.setFormatter(logging.Formatter("%(message)s"))
    settings: dict[str, Any] = {"opsin": handler, "uvicorn": handler, "opsin.access": plain}
    for name, chosen in settings.items():
        logger = logging.getLogger(name)
        logger.handlers = [chosen]
        logger.propagate = False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel("WARNING" if level != "debug" else "DEBUG")
