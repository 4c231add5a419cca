"""Thousands of mixed requests against one server: what leaks, whose answer changes, what it costs.

    python bench/soak.py --requests 10000 --concurrency 64
    python bench/soak.py --requests 0 --streams 64 --tokens 256

The server runs in this process, its clients in another. Of the requests a twentieth leave at some
moment and a twentieth bring media that cannot be read; every other one is one of a few dozen kinds
(text and pictures, streamed and not, sampled with a seed, held to a form), whose answer is compared
with the one it got alone. Then --streams text streams run at once: the CPU time of every thread but
the engine's is what serving costs. The bundled model answers. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

KINDS = 36
BAD = (
    "data:image/png;base64,AAAA",
    "data:image/png;base64,!!",
    "http://127.0.0.1:9/none.png",
    "file:///etc/hostname",
    "data:image/gif;base64,R0lGODlhAQABAAAAACw=",
)


def body(kind: int) -> dict[str, Any]:
    """One of the kinds of requests."""
    content: list[dict[str, Any]] = [{"type": "text", "text": f"Question {kind}: what is it?"}]
    if kind % 3 == 0:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture(kind)}})
    asked = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4 + kind % 9,
        "stream": kind % 2 == 0,
        "seed": kind,
        "temperature": 0.8 if kind % 4 == 1 else 0.0,
    }
    return asked | ({"regex": "[a-z]{3,8}"} if kind % 7 == 5 else {})


def picture(seed: int) -> str:
    """A small picture of noise as a data URL."""
    from PIL import Image

    side = 32 + 16 * (seed % 4)
    image = Image.frombytes("RGB", (side, side), random.Random(seed).randbytes(3 * side * side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Clients:
    """Many clients of one server, each with a socket of its own for each request."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.counts: Counter[str] = Counter()
        self.answers: dict[int, str] = {}
        self.bodies = [json.dumps(body(kind)).encode() for kind in range(KINDS)]

    async def send(self, payload: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection and send a chat request over it."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
        )
        writer.write(head.encode() + payload)
        await writer.drain()
        return reader, writer

    async def ask(self, payload: bytes) -> tuple[int, str]:
        """The status of a reply and the text of its answer."""
        reader, writer = await self.send(payload)
        try:
            raw = await reader.read(-1)
        finally:
            writer.close()
        head, _, rest = raw.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status != 200 or b"chunked" not in head:
            whole = rest.decode()
            return status, json.loads(whole)["choices"][0]["message"]["content"] if (
                status == 200
            ) else whole
        said = ""
        for line in rest.split(b"\n"):
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                said += (choices[0]["delta"].get("content") or "") if choices else ""
        return status, said

    async def leave(self, payload: bytes, rng: random.Random) -> None:
        """Send a request, or part of one, and go at some moment."""
        reader, writer = await self.send(payload[: rng.choice((len(payload), len(payload) // 2))])
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.3)
        writer.transport.abort()
        del reader

    async def one(self, number: int) -> None:
        """The numbered request of a load."""
        rng = random.Random(number)
        kind = rng.randrange(KINDS)
        share = rng.random()
        if share < 0.05:
            await self.leave(self.bodies[kind], rng)
            self.counts["left"] += 1
        elif share < 0.1:
            part = {"type": "image_url", "image_url": {"url": rng.choice(BAD)}}
            asked = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 4}
            status, _ = await self.ask(json.dumps(asked).encode())
            self.counts["bad media refused" if 400 <= status < 500 else "bad media taken"] += 1
        else:
            status, said = await self.ask(self.bodies[kind])
            same = status == 200 and said == self.answers[kind]
            self.counts["same" if same else f"changed {status}"] += 1

    async def load(self, numbers: range, concurrency: int) -> None:
        """All those requests, so many at once."""
        left = iter(numbers)

        async def work() -> None:
            for number in left:
                await self.one(number)

        await asyncio.gather(*(work() for _ in range(concurrency)))

    async def alone(self) -> None:
        """Every kind's answer when nothing else runs."""
        for kind, payload in enumerate(self.bodies):
            status, self.answers[kind] = await self.ask(payload)
            assert status == 200, self.answers[kind]

    async def streams(self, count: int, tokens: int) -> None:
        """So many text streams at once."""
        asked = {"max_tokens": tokens, "ignore_eos": True, "stream": True}
        payloads = [
            json.dumps({"messages": [{"role": "user", "content": f"Tell {i}"}], **asked}).encode()
            for i in range(count)
        ]
        found = await asyncio.gather(*(self.ask(payload) for payload in payloads))
        self.counts["streams ended"] += sum(status == 200 for status, _ in found)


async def clients(port: int) -> None:
    """The other process: do what each line on stdin says, and answer with counts."""
    crowd = Clients("127.0.0.1", port)
    for line in sys.stdin:
        name, *numbers = line.split()
        if name == "alone":
            await crowd.alone()
        elif name == "load":
            first, count, concurrency = map(int, numbers)
            await crowd.load(range(first, first + count), concurrency)
        else:
            await crowd.streams(*map(int, numbers))
        print(json.dumps(crowd.counts), flush=True)


class Served:
    """The server in a thread of this process, and its clients in another."""

    def __init__(self, args: argparse.Namespace) -> None:
        from opsin.server.run import Server
        from opsin.server.settings import ServeSettings

        settings = ServeSettings(
            model=args.model,
            host="127.0.0.1",
            port=0,
            max_num_seqs=64,
            memory=args.memory,
            log_level="warning",
        )
        self.server = Server(settings)
        threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True).start()
        self.wait(lambda: self.server.started)
        self.clients = subprocess.Popen(
            [sys.executable, __file__, "--clients", str(self.server.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def engine(self) -> Any:
        """The engine of the model, which the first request loads."""
        return self.server.app.state.service.manager.loaded[0].engine

    def tell(self, *words: object) -> dict[str, int]:
        """Have the clients do something; their counts afterwards."""
        assert self.clients.stdin is not None
        assert self.clients.stdout is not None
        print(*words, file=self.clients.stdin, flush=True)
        return json.loads(self.clients.stdout.readline())

    def wait(self, condition: Any) -> None:
        """Return once it holds."""
        while not condition():
            time.sleep(0.05)

    def held(self) -> dict[str, int]:
        """What the process holds when nothing runs."""
        stats = self.engine.stats
        self.wait(lambda: not stats()["running"] and not stats()["waiting"])
        self.wait(lambda: not self.server.app.state.service.shop.admission.held)
        gc.collect()
        self.engine.scheduler.check_integrity()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "blocks_in_use": stats()["num_blocks"] - stats()["free_blocks"],
            "threads": threading.active_count(),
            "descriptors": len(list(Path("/proc/self/fd").iterdir())),
            "resident_mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        }

    def serving_seconds(self) -> float:
        """CPU time of all Python threads so far but the engine's (its own helpers count to it)."""
        ticks = 0
        for thread in threading.enumerate():
            if thread.name != "opsin-engine":
                stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
                ticks += sum(map(int, stat.rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")


def overhead(served: Served, streams: int, tokens: int) -> dict[str, Any]:
    """CPU of serving a streamed token, and a request of one token, in milliseconds."""
    found = {}
    for name, count, length in (("a_token", streams, tokens), ("a_request", streams, 1)):
        rounds = 1 if length > 1 else 8
        before = served.serving_seconds()
        for _ in range(rounds):
            served.tell("streams", count, length)
        spent = served.serving_seconds() - before
        found[f"serving_ms_{name}"] = round(1000 * spent / (count * length * rounds), 3)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub name; the bundled model by default")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--streams", type=int, default=64, help="at once, for the costs; 0: none")
    parser.add_argument("--tokens", type=int, default=256, help="of each of those")
    parser.add_argument("--crowd", type=int, default=200, help="streams at once, only to end")
    parser.add_argument("--memory", type=int, default=2**28, help="bytes of the cache")
    parser.add_argument("--clients", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clients:
        asyncio.run(clients(args.clients))
        return
    served = Served(args)
    line: dict[str, Any] = {"bench": "soak", "requests": args.requests}
    served.tell("alone")
    tenth = args.requests // 10
    counts = served.tell("load", 0, tenth, args.concurrency)
    line["after_a_tenth"] = served.held()
    started = time.perf_counter()
    counts = served.tell("load", tenth, args.requests - tenth, args.concurrency)
    line["seconds"] = round(time.perf_counter() - started, 1)
    line["after_all"] = served.held()
    if args.crowd:
        counts = served.tell("streams", args.crowd, 64)
        line["after_the_crowd"] = served.held()
    line["counts"] = counts
    if args.streams:
        line |= overhead(served, args.streams, args.tokens)
    line["load_average"] = round(os.getloadavg()[0], 1)
    served.clients.kill()
    print(json.dumps(line))


if __name__ == "__main__":
    main()
