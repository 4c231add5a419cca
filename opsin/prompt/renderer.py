"""Renders chat templates in a process of their own, within limits on time, memory and output.

A template comes with a checkpoint and is a program: inside this process nothing could end one that
multiplies strings, compares nested lists or loops without output. In its own process it is ended by
ending the process, in any thread and on any system. The process starts in about 0.1 s, is kept, and
leaves with its owner (its stdin closes).
"""

import atexit
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opsin.errors import InputError
from opsin.media.process import WorkerProcess

_WORKER = Path(__file__).with_name("jinja_worker.py")


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one rendering may take: wall-clock seconds, characters written, bytes of memory."""

    seconds: float = 10.0
    chars: int = 16 << 20
    memory: int = 1 << 30


class Renderer:
    """One rendering process and the conversation with it; safe to call from any thread."""

    def __init__(self, limits: RenderLimits | None = None) -> None:
        self.limits = limits or RenderLimits()
        self._lock = threading.Lock()
        self._process: WorkerProcess | None = None

    def warm_up(self) -> None:
        """Start the process if it is not there, without waiting for it."""
        with self._lock:
            self._running()

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text that a template makes of its variables, which must be plain JSON values.

        Raises InputError when the template refuses (in its own words), fails, or passes a limit.
        """
        request = {
            "source": source,
            "variables": variables,
            "max_chars": self.limits.chars,
            "seconds": self.limits.seconds,
        }
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            answer = self._ask(line) or self._ask(line)
        if not answer:
            raise _failure("failed", "it ended the process that renders it", self.limits)
        reply = json.loads(answer)
        if "error" in reply:
            raise _failure(reply["error"], reply["message"], self.limits)
        return str(reply["text"])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._discard()

    def _ask(self, line: bytes) -> bytes:
        """Send one request; the answer, or nothing if the process went away on its own."""
        process = self._running()
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(self.limits.seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            process.send(line)
            answer = process.line()
        finally:
            timer.cancel()
            timer.join()
        whole = answer.endswith(b"\n")
        if expired.is_set() or not whole:
            self._discard()
        if expired.is_set() and not whole:
            raise _failure("time", "", self.limits)
        return answer if whole else b""

    def _running(self) -> WorkerProcess:
        """The process, started if there is none or if a parent process owns it."""
        if self._process is None or not self._process.alive:
            self._discard()
            self._process = WorkerProcess(_WORKER, {"memory": self.limits.memory})
        return self._process

    def _discard(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.close()


@cache
def shared_renderer() -> Renderer:
    """The renderer that templates use unless they are given one."""
    renderer = Renderer()
    atexit.register(renderer.close)
    return renderer


def _failure(kind: str, message: str, limits: RenderLimits) -> InputError:
    remedy = "give another template with --chat-template"
    if kind == "refused":
        return InputError(
            "The chat template refuses this conversation", why=message, param="messages"
        )
    if kind == "syntax":
        return InputError(
            "The chat template is not valid Jinja",
            why=message,
            remedy=remedy,
            param="chat_template",
        )
    reasons = {
        "time": f"it took more than {limits.seconds:g} s",
        "output": f"it wrote more than {limits.chars} characters",
        "memory": f"it needed more than {limits.memory >> 20} MiB of memory",
    }
    if kind in reasons:
        return InputError(
            "The chat template was stopped", why=reasons[kind], remedy=remedy, param="chat_template"
        )
    return InputError("The chat template failed", why=message, remedy=remedy, param="chat_template")
