"""`opsin bench serve`: a load of text and picture requests against any OpenAI server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opsin.errors import EngineError, InputError

if TYPE_CHECKING:
    import httpx

WORDS = ("amber", "basalt", "candle", "delta", "ember", "forest", "granite", "harbour", "island")


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: how often, how much at once, and of what kind."""

    base_url: str
    model: str
    requests: int
    concurrency: int
    max_tokens: int
    prompt_words: int
    image_share: float
    image_size: tuple[int, int]
    ignore_eos: bool
    api_key: str
    timeout: float
    seed: int


@dataclass(slots=True)
class Outcome:
    """What one request got; times in seconds from its start."""

    has_image: bool
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    total: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    chunks: int = 0
    error: str | None = None


def body(load: Load, index: int) -> tuple[dict[str, Any], bool]:
    """One request, different from every other, and whether it holds a picture."""
    rng = random.Random(f"{load.seed}-{index}")
    words = " ".join(rng.choice(WORDS) for _ in range(load.prompt_words))
    content: list[dict[str, Any]] = [
        {"type": "text", "text": f"Request {index}: {words}. Tell a story of these."}
    ]
    has_image = rng.random() < load.image_share
    if has_image:
        url = picture_url(rng, load.image_size)
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    asked: dict[str, Any] = {
        "model": load.model,
        "messages": [{"role": "user", "content": content if has_image else content[0]["text"]}],
        "max_tokens": load.max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return ({**asked, "ignore_eos": True} if load.ignore_eos else asked), has_image


def picture_url(rng: random.Random, size: tuple[int, int]) -> str:
    """A picture of random rectangles as a data URL."""
    from PIL import Image, ImageDraw

    def colour() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    image = Image.new("RGB", size, colour())
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = rng.randrange(size[0]), rng.randrange(size[1])
        right, bottom = rng.randrange(left, size[0] + 1), rng.randrange(top, size[1] + 1)
        draw.rectangle((left, top, right, bottom), fill=colour())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


async def ask(client: httpx.AsyncClient, load: Load, index: int) -> Outcome:
    """Send one request and read its stream."""
    import httpx

    asked, has_image = body(load, index)
    content = json.dumps(asked).encode()
    outcome = Outcome(has_image)
    started = time.perf_counter()
    try:
        async with client.stream("POST", "chat/completions", content=content) as reply:
            if reply.status_code != 200:
                outcome.error = str(reply.status_code)
                await reply.aread()
            else:
                await read(reply, outcome, started)
    except httpx.HTTPError as error:
        outcome.error = type(error).__name__
    outcome.total = time.perf_counter() - started
    if outcome.error is None and outcome.first is None:
        outcome.error = "empty"
    return outcome


async def read(reply: httpx.Response, outcome: Outcome, started: float) -> None:
    """Read server-sent events, noting when those with content come."""
    latest = 0.0
    async for line in reply.aiter_lines():
        if not line.startswith("data:") or line.endswith("[DONE]"):
            continue
        event = json.loads(line[5:])
        if "error" in event:
            outcome.error = "error event"
            continue
        if event.get("usage"):
            outcome.prompt_tokens = event["usage"].get("prompt_tokens", 0)
            outcome.tokens = event["usage"].get("completion_tokens", 0)
        deltas = [choice.get("delta") or {} for choice in event.get("choices") or ()]
        if not any(d.get(k) for d in deltas for k in ("content", "reasoning_content", "reasoning")):
            continue
        now = time.perf_counter() - started
        outcome.chunks += 1
        if outcome.first is None:
            outcome.first = now
        else:
            outcome.gaps.append(now - latest)
        latest = now


async def run(load: Load, warm_up: int) -> tuple[list[Outcome], float]:
    """Every outcome, and the seconds that all took together."""
    import httpx

    headers = {"content-type": "application/json"}
    if load.api_key:
        headers["authorization"] = f"Bearer {load.api_key}"
    limits = httpx.Limits(max_connections=load.concurrency)
    async with httpx.AsyncClient(
        base_url=load.base_url.rstrip("/") + "/",
        headers=headers,
        timeout=load.timeout,
        limits=limits,
        trust_env=False,
    ) as client:
        for i in range(warm_up):
            first = await ask(client, load, -1 - i)
            if first.error is not None:
                raise EngineError(
                    f"The server at {load.base_url} does not answer",
                    why=first.error,
                    remedy="Check --base-url, --model and --api-key",
                )
        waiting = iter(range(load.requests))
        outcomes: list[Outcome] = []

        async def worker() -> None:
            for i in waiting:
                outcomes.append(await ask(client, load, i))

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(load.concurrency)))
        return outcomes, time.perf_counter() - started


def percentile(values: list[float], share: float) -> float | None:
    """The smallest value that `share` of the values do not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(load: Load, outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """The figures of a run; times in milliseconds."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    # A server that reports no usage is counted by its chunks, which may hold several tokens.
    tokens = sum(outcome.tokens or outcome.chunks for outcome in good)

    def spread(values: list[float]) -> dict[str, float | None]:
        found = {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}
        return {k: None if v is None else round(v * 1000, 2) for k, v in found.items()}

    return {
        "requests": len(outcomes),
        "concurrency": load.concurrency,
        "with_image": sum(outcome.has_image for outcome in outcomes),
        "errors": dict(Counter(o.error for o in outcomes if o.error is not None)),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 2),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        "generated_tokens": tokens,
        "time_to_first_token_ms": {
            "text": spread([o.first or 0.0 for o in good if not o.has_image]),
            "image": spread([o.first or 0.0 for o in good if o.has_image]),
        },
        "inter_token_ms": spread([gap for outcome in good for gap in outcome.gaps]),
        "request_ms": spread([outcome.total for outcome in good]),
    }


def size_of(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT in pixels."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise InputError(
            f"{text!r} is no picture size", remedy="Write it like 640x480", param="image-size"
        )
    return int(width), int(height)


def command(
    base_url: Annotated[
        str, typer.Option(help="The server's OpenAI address.")
    ] = "http://127.0.0.1:8080/v1",
    model: Annotated[str, typer.Option("--model", "-m", help="The model to ask.")] = "default",
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="How many at once.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 128,
    prompt_words: Annotated[int, typer.Option(min=0, help="Words of each prompt.")] = 64,
    image_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of requests with a picture.")
    ] = 0.0,
    image_size: Annotated[str, typer.Option(help="Size of the pictures.")] = "640x480",
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for answers of full length (the server must know the field).")
    ] = False,
    api_key: Annotated[str, typer.Option(help="The key to send.")] = "",
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = 600.0,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before the clock starts.")] = 1,
    seed: Annotated[int, typer.Option(help="Another seed, other prompts and pictures.")] = 0,
) -> None:
    """Measure a server under load; prints one line of JSON."""
    load = Load(
        base_url,
        model,
        requests,
        concurrency,
        max_tokens,
        prompt_words,
        image_share,
        size_of(image_size),
        ignore_eos,
        api_key,
        timeout,
        seed,
    )
    outcomes, seconds = asyncio.run(run(load, warm_up))
    typer.echo(json.dumps(summary(load, outcomes, seconds)))
