"""Text streams at once through the server, beside llama-server with as many slots, in one run.

    python bench/serving.py --shape qwen3-vl-2b --quant 4 --rival llama-server \\
        --rival-server llama-server --rival-python PY

A checkpoint of a published shape with random weights is served by both, its vocabulary made up so
that a text is as many tokens for both (bench/vocabulary.py). The client is that of
`opsin bench serve`: --streams chats at once, each its own prompt, greedy, --tokens new tokens each
whatever they are; prefill is counted in. The servers stay up side by side and are asked in turn;
medians, and the median of the rounds' ratios. The last line is JSON.

llama-server is llama.cpp's own, built for this machine (`cmake -B build -DGGML_NATIVE=ON`, then
`cmake --build build --target llama-server`; where it uses AMX see bench/llama_cpp_engine.py), given
as --rival-server. It runs with a slot and context for every stream, --threads, batches that go on
without waiting (its default) and flash attention where it can. PY is only needed to write its files
where they are missing: a Python with llama-cpp-python and gguf.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from cpu import EngineProcess, gguf_files, quietest
from vocabulary import write_tokenizer

from opsin.cli import bench_serve

START_SECONDS = 600.0
STOP_SECONDS = 30.0
ROW = "streams"
READY = {"opsin": "/ready", "llama-server": "/health"}
FIGURES = {
    "tokens_per_second": "output, tok/s",
    "first_token_ms": "first token, p50, ms",
    "gap_ms": "between tokens, p50, ms",
    "gap_p99_ms": "between tokens, p99, ms",
    "peak_memory_gb": "peak memory, GB",
}


class Server(EngineProcess):
    """A server in a process of its own, asked as an engine is."""

    def __init__(self, command: list[str], args: argparse.Namespace, ready: str) -> None:
        self.args, self.turns = args, 0
        port = free_port()
        counts = dict.fromkeys(("OMP_NUM_THREADS", "OPSIN_NUM_THREADS"), str(args.threads))
        self.log = Path(tempfile.mkstemp(prefix="bench-serving-", suffix=".log")[1])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdout=log, stderr=log, env=os.environ | counts,
            )  # fmt: skip
        self.url = f"http://127.0.0.1:{port}"
        try:
            self.loaded = {"load_s": self.wait(ready)}
        except BaseException:
            self.close()
            raise

    def wait(self, ready: str) -> float:
        """Seconds until the server answers this path well, which says that it is ready."""
        start = time.monotonic()
        while time.monotonic() - start < START_SECONDS:
            if self.process.poll() is not None:
                raise SystemExit(f"a server ended:\n{self.log.read_text()[-3000:]}")
            try:
                if httpx.get(f"{self.url}{ready}", trust_env=False).status_code == 200:
                    return time.monotonic() - start
            except httpx.HTTPError:
                pass  # it does not listen yet
            time.sleep(0.1)
        raise SystemExit(f"a server did not start:\n{self.log.read_text()[-3000:]}")

    def own_seconds(self) -> float:
        """Processor seconds of the server and of the client so far."""
        return super().own_seconds() + time.process_time()

    def exchange(self, row: str) -> dict[str, float]:
        """One load of streams, with prompts that no other load had."""
        args = self.args
        load = bench_serve.Load(
            base_url=f"{self.url}/v1", model="default", requests=args.streams,
            concurrency=args.streams, max_tokens=args.tokens, prompt_words=args.prompt_words,
            image_share=0.0, image_size=(1, 1), ignore_eos=True, api_key="",
            timeout=3600.0, seed=self.turns,
        )  # fmt: skip
        self.turns += 1
        figures = bench_serve.summary(load, *asyncio.run(bench_serve.run(load, warm_up=0)))
        if figures["errors"] or figures["generated_tokens"] != args.streams * args.tokens:
            raise SystemExit(f"not every stream was answered in full: {figures}")
        return {
            "tokens_per_second": figures["tokens_per_second"],
            "first_token_ms": figures["time_to_first_token_ms"]["text"]["p50"],
            "gap_ms": figures["inter_token_ms"]["p50"],
            "gap_p99_ms": figures["inter_token_ms"]["p99"],
            "prompt_tokens": figures["prompt_tokens"],
            "peak_memory_gb": self.peak_memory_gb(),
        }

    def peak_memory_gb(self) -> float:
        """The most memory that the server has had, mapped files included."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9

    def close(self) -> None:
        """Stop the server."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.unlink()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def served_folder(args: argparse.Namespace) -> Path:
    """The checkpoint with a tokenizer beside it: what a server needs and random weights lack."""
    from latency import write_checkpoint

    folder = write_checkpoint(args.shape, Path(args.workdir) / args.shape)
    served = folder.with_name(f"{folder.name}-served")
    served.mkdir(exist_ok=True)
    for path in folder.iterdir():
        link = served / path.name
        if path.is_file() and not link.exists():
            link.symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    write_tokenizer(served, config["model_type"], config["text_config"]["vocab_size"])
    return served


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """How each server is started, but for its address."""
    folder = served_folder(args)
    ours = [sys.executable, "-m", "opsin", "serve", str(folder), "--log-level", "warning"]
    if args.quant != 16:
        ours += ["--quant", str(args.quant)]
    if args.rival is None:
        return {"opsin": ours}
    text = gguf_files(args, folder.with_name(args.shape), args.quant)
    theirs = [args.rival_server, "--model", str(text), "--parallel", str(args.streams)]
    theirs += ["--ctx-size", str(args.streams * args.context), "--threads", str(args.threads)]
    theirs += ["--cont-batching", "--flash-attn", "auto", "--jinja"]
    theirs += ["--chat-template-file", str(folder / "chat_template.jinja")]
    return {"opsin": ours, "llama-server": theirs}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Ask both servers in turn; what each round found, summed up."""
    seen: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as opened:
        servers: dict[str, EngineProcess] = {}
        for name, command in commands(args).items():
            servers[name] = Server(command, args, READY[name])
            opened.callback(servers[name].close)
            servers[name].ask(ROW)  # the first time warms up
        for turn in range(args.rounds):
            order = list(servers) if turn % 2 == 0 else list(reversed(servers))
            print(f"turn {turn + 1} of {args.rounds}", file=sys.stderr, flush=True)
            for name, figures in quietest(args, {name: servers[name] for name in order}, ROW):
                for figure, value in figures.items():
                    seen.setdefault(name, {}).setdefault(figure, []).append(value)
    return summary(args, {name: seen[name] for name in servers})


def summary(args: argparse.Namespace, seen: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians of each server, and the median of the rounds' ratios (ours over the rival's)."""
    out: dict[str, Any] = {"bench": "serving", "load_average": os.getloadavg()}
    keys = ("shape", "quant", "streams", "tokens", "threads", "rounds")
    out |= {key: getattr(args, key) for key in keys}
    for figure in (*FIGURES, "prompt_tokens", "others"):
        entry = {name: round(statistics.median(own[figure]), 3) for name, own in seen.items()}
        if len(seen) == 2 and figure in FIGURES:
            ours, theirs = (own[figure] for own in seen.values())
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            entry["ratio"] = round(statistics.median(ratios), 3)
            entry["lowest_ratio"] = round(min(ratios), 3)
            entry["highest_ratio"] = round(max(ratios), 3)
        out[figure] = entry
        if figure in FIGURES:
            shown = "  ".join(f"{name} {value:9.3f}" for name, value in entry.items())
            print(f"{FIGURES[figure]:26}", shown, flush=True)
    return out


def end_well() -> None:
    """When told to end (SIGTERM), leave as an error does: the servers are stopped on the way."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def main() -> None:
    """Command line."""
    end_well()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="smolvlm-256m")
    parser.add_argument("--quant", type=int, choices=[4, 8, 16], default=4, help="bits of weights")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each stream")
    parser.add_argument("--prompt-words", type=int, default=8)
    parser.add_argument("--context", type=int, default=512, help="tokens of a slot of the rival")
    parser.add_argument("--rival", choices=["llama-server"])
    parser.add_argument("--rival-server", default="llama-server", help="the program")
    parser.add_argument("--rival-python", default=sys.executable)
    parser.add_argument("--rival-tower", default="f16", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--others", type=float, default=0.1, help="share of the machine, 0 to 1")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--clock", default="wall", help=argparse.SUPPRESS)
    parser.add_argument("--workdir", default=Path(tempfile.gettempdir()) / "opsin-bench")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
