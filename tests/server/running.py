"""Runs the real server on a real socket of this machine, in a thread of the test process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from opsin.server.run import Server
from opsin.server.service import Service
from opsin.server.settings import ServeSettings


class Running:
    """A server at work, and how to reach it."""

    def __init__(self, settings: ServeSettings) -> None:
        self.server = Server(settings)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started or not self.thread.is_alive())
        assert self.server.started
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def _run(self) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            await self.server.serve()

        asyncio.run(main())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def service(self) -> Service:
        return self.server.app.state.service

    def ready(self) -> Running:
        """Itself, once the model is loaded."""
        wait_for(lambda: self.client.get("/ready").status_code == 200)
        return self

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.client.post(path, json=body, **kwargs)

    def chat(self, text: str = "Say something", **fields: Any) -> httpx.Response:
        """One question, four tokens of answer unless told otherwise."""
        message = {"role": "user", "content": text}
        body = {"messages": [message], "max_tokens": 4, "ignore_eos": True, **fields}
        return self.post("/v1/chat/completions", body)

    def is_quiet(self) -> bool:
        """Whether nothing is at work and nothing is held."""
        engines = [model.engine for model in self.service.manager.loaded]
        counts = [engine.stats() for engine in engines]
        idle = all(not c["running"] and not c["waiting"] for c in counts)
        free = all(c["free_blocks"] == c["num_blocks"] for c in counts)
        leases = sum(model.leases for model in self.service.manager.loaded)
        return idle and free and not leases and not self.service.shop.admission.held

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Return as soon as the condition holds; fail when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        threading.Event().wait(0.005)


@contextmanager
def serving(model: Path | None, **settings: Any) -> Iterator[Running]:
    """A server of these settings, stopped at the end."""
    given = {"host": "127.0.0.1", "port": 0, "memory": 2**24, "max_num_seqs": 16, **settings}
    running = Running(ServeSettings(model=None if model is None else str(model), **given))
    try:
        yield running
    finally:
        running.stop()
