"""Where the page's answers come from: models in this process, or a server."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import httpx
from PIL import Image

from opsin.api import GenerationResult, figures, fold, load, stream_generate
from opsin.checkpoint.hub import cached_models
from opsin.errors import EngineError, InputError
from opsin.grounding import Box, Point, Polygon, Region, draw
from opsin.media import load_image
from opsin.prompt.stream import THINK, StreamSplitter
from opsin.ui.turns import Settings, kind_of

KEPT = 2  # models in memory at once
BUNDLED = "bundled"


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer; the last one has figures to print, and the pictures drawn."""

    text: str = ""
    reasoning: str = ""
    figures: str = ""
    pictures: tuple[Image.Image, ...] = field(default=())
    finish_reason: str | None = None


class Backend(Protocol):
    """What the page asks for."""

    def models(self) -> list[str]:
        """The models there are to choose from, the first by default."""

    def state(self, model: str) -> str:
        """A word or two on whether a model is loaded."""

    def prepare(self, model: str) -> None:
        """Load a model; raises OpsinError."""

    def stream(
        self, messages: Sequence[dict[str, Any]], settings: Settings
    ) -> Generator[Piece, None, None]:
        """The answer as it comes; closing the iterator ends it. Raises OpsinError."""


class Local:
    """Models in this process: the last few that were asked for stay loaded."""

    def __init__(self, first: str, **options: Any) -> None:
        self.first = first
        self.options = options
        self._held: OrderedDict[str, tuple[Any, Any]] = OrderedDict()
        self._busy: Counter[str] = Counter()
        self._lock = threading.Lock()

    def models(self) -> list[str]:
        """The first, the bundled one, and those in the hub's cache."""
        return list(dict.fromkeys([self.first, BUNDLED, *(m.name for m in cached_models())]))

    def state(self, model: str) -> str:
        """Whether it is loaded."""
        return "loaded" if model in self._held else "loads with the first question"

    def prepare(self, model: str) -> None:
        """Load it."""
        with self._using(model):
            pass

    @contextlib.contextmanager
    def _using(self, model: str) -> Iterator[tuple[Any, Any]]:
        """A loaded model that stays while it answers; one that nobody uses makes room for it."""
        with self._lock:
            if model not in self._held:
                idle = [name for name in self._held if not self._busy[name]]
                for name in idle[: max(0, len(self._held) - KEPT + 1)]:
                    gone, _ = self._held.pop(name)
                    if gone.engine is not None:
                        gone.engine.close()
                self._held[model] = load(model, **self.options)
            self._held.move_to_end(model)
            self._busy[model] += 1
            held = self._held[model]
        try:
            yield held
        finally:
            with self._lock:
                self._busy[model] -= 1

    def stream(
        self, messages: Sequence[dict[str, Any]], settings: Settings
    ) -> Generator[Piece, None, None]:
        """Generate here."""
        with self._using(settings.model) as held:
            yield from _generated(held, messages, settings)


def _generated(
    held: tuple[Any, Any], messages: Sequence[dict[str, Any]], settings: Settings
) -> Iterator[Piece]:
    """The pieces of an answer of a model in this process."""
    model, processor = held
    given: dict[str, Any] = {"enable_thinking": True} if settings.thinking else {}
    results = cast(
        "Generator[GenerationResult]",
        stream_generate(
            model,
            processor,
            list(messages),
            max_tokens=settings.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            **given,
        ),
    )
    splitter = StreamSplitter([THINK])
    kept = []
    with contextlib.closing(results):
        for result in results:
            kept.append(result)
            for segment in splitter.push(result.text):
                yield _piece(segment.kind, segment.text)
    for segment in splitter.finish():
        yield _piece(segment.kind, segment.text)
    whole = fold(iter(kept))
    yield Piece(
        figures=figures(whole),
        pictures=tuple(whole.annotated()),
        finish_reason=whole.finish_reason,
    )


def _piece(kind: str, text: str) -> Piece:
    return Piece(reasoning=text) if kind == "reasoning" else Piece(text)


class Remote:
    """An OpenAI-compatible server."""

    def __init__(self, base_url: str, api_key: str = "") -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(600, connect=10)
        self.client = httpx.Client(
            base_url=base_url.rstrip("/") + "/", headers=headers, timeout=timeout, trust_env=False
        )

    def models(self) -> list[str]:
        """What the server lists, "default" first."""
        reply = self._asked("GET", "models")
        return list(dict.fromkeys(["default", *(row["id"] for row in reply.get("data", []))]))

    def state(self, model: str) -> str:
        """The server knows."""
        return "on the server"

    def prepare(self, model: str) -> None:
        """The server loads on demand."""

    def _asked(self, method: str, path: str) -> dict[str, Any]:
        with _errors_in_words():
            reply = self.client.request(method, path)
        if reply.status_code != 200:
            raise EngineError("The server refused", why=_said(reply.status_code, reply.content))
        made: dict[str, Any] = reply.json()
        return made

    def stream(
        self, messages: Sequence[dict[str, Any]], settings: Settings
    ) -> Generator[Piece, None, None]:
        """Ask the server."""
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": [_sendable(message) for message in messages],
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.thinking:
            body["chat_template_kwargs"] = {"enable_thinking": True}
        regions: list[dict[str, Any]] = []
        told: dict[str, Any] = {}
        reason = None
        with (
            _errors_in_words(),
            self.client.stream("POST", "chat/completions", json=body) as reply,
        ):
            if reply.status_code != 200:
                raise EngineError("The server refused", why=_said(reply.status_code, reply.read()))
            for event in _events(reply.iter_lines()):
                if "error" in event:
                    raise EngineError("The answer ended", why=event["error"].get("message", ""))
                told = {**told, **{k: event[k] for k in ("usage", "timings") if event.get(k)}}
                for choice in event.get("choices", []):
                    delta = choice.get("delta") or {}
                    regions = choice.get("regions") or regions
                    reason = choice.get("finish_reason") or reason
                    thought = delta.get("reasoning_content") or ""
                    yield Piece(delta.get("content") or "", thought)
        yield Piece(
            figures=_figures(told),
            pictures=tuple(_drawn(messages, regions)),
            finish_reason=reason,
        )


@contextlib.contextmanager
def _errors_in_words() -> Iterator[None]:
    """A server that cannot be reached is an error in words."""
    try:
        yield
    except httpx.HTTPError as error:
        raise EngineError(
            "The server cannot be reached",
            why=str(error) or type(error).__name__,
            remedy="Check --base-url, and that the server runs",
        ) from error


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def _said(status: int, body: bytes) -> str:
    """The server's own words."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"status {status}"


def _figures(told: dict[str, Any]) -> str:
    usage, timings = told.get("usage") or {}, told.get("timings") or {}
    count, seconds = usage.get("completion_tokens", 0), timings.get("generate", 0.0)
    lines = [f"Prompt: {usage.get('prompt_tokens', 0)} tokens", f"Answer: {count} tokens"]
    if seconds:
        lines[1] += f", {(count - 1) / seconds:.1f} tokens/s"
    if timings:
        lines.append("Seconds: " + ", ".join(f"{k} {v:.3f}" for k, v in timings.items() if v))
    return "\n".join(lines)


def _sendable(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its files as data URLs."""
    if isinstance(message["content"], str):
        return message
    return {**message, "content": [_part(part) for part in message["content"]]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return part
    path = Path(part[kind])
    data = base64.b64encode(path.read_bytes()).decode()
    if kind == "document":
        return {"type": "file", "file": {"file_data": f"data:application/pdf;base64,{data}"}}
    ending = path.suffix.lower().lstrip(".")
    if kind == "audio":
        return {"type": "input_audio", "input_audio": {"data": data, "format": ending}}
    url = f"data:{kind}/{ending};base64,{data}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def _drawn(
    messages: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> Iterator[Image.Image]:
    """The pictures of the conversation with the regions of a reply drawn on them."""
    paths = [
        part["image"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]
    for place, path in enumerate(paths):
        mine = [row for row in rows if row.get("image_index", 0) == place]
        if mine and kind_of(path) == "image":
            yield draw(load_image(path), [_region(row) for row in mine])


def _region(row: dict[str, Any]) -> Region:
    values = [float(value) for value in row[row["type"]]]
    label = row.get("label") or row.get("category") or row.get("text") or ""
    if row["type"] == "box":
        return Box(*values, label=label)
    if row["type"] == "point":
        return Point(*values, label=label)
    if row["type"] == "polygon":
        return Polygon(tuple(zip(values[::2], values[1::2], strict=True)), label=label)
    raise InputError(f"The server named a region of kind {row['type']}")
