"""The CPU: kernels against this machine's limits, and whole models beside a rival, in one run.

    python bench/cpu.py kernels
    python bench/cpu.py models --shape qwen3-vl-2b --bits 4 --rival llama.cpp --rival-python PY

`kernels` reads weights from a ring of matrices too large for the caches and compares with torch's
kernels and with what this machine can read and compute at most.

`models` writes a checkpoint of a published shape with random weights once (speed does not depend on
the values), loads Opsin and the rival side by side, each in a process of its own, and asks them in
turn, so that a noisy machine disturbs both alike: medians, and the median of the ratios. How fast
memory is read is measured before each row: one answer goes no faster than its weights come. PY is
the Python of an environment in which the rival is installed as its users install it: for llama.cpp
`CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf`, for openvino
`pip install optimum-intel[openvino] transformers==4.57.6` (optimum-intel 2.2 exports some models
with no later one); Transformers runs with this one. OpenVINO's own default is 8 bits: --rival-bits
8 compares our 4 with them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from cpu_rows import CLOCK

from opsin.cli.doctor import read_bandwidth

HERE = Path(__file__).parent
ROWS = ("decode", "prefill", "streams", "picture")
FIGURES = {
    "decode": "decode, short context, tok/s",
    "streams": "8 sequences at once, total tok/s",
    "prefill": "prefill of 512 text tokens, tok/s",
    "ttft_picture": "first token, 1024x768 picture, s",
    "ttft_pictures": "first token, 4 pictures, s",
    "decode_picture": "decode after the picture, tok/s",
    "peak_memory_gb": "peak memory, GB",
    "load_s": "load, s",
}


def busy_seconds() -> float:
    """Processor seconds that this machine has worked, or was kept from working, so far."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")


class EngineProcess:
    """An engine in a process of its own; see cpu_rows.answer."""

    def __init__(self, command: list[str], args: argparse.Namespace) -> None:
        counts = dict.fromkeys(("OMP_NUM_THREADS", "OPSIN_NUM_THREADS"), str(args.threads))
        environment = os.environ | counts | {CLOCK: args.clock}
        self.log = Path(tempfile.mkstemp(prefix="bench-cpu-", suffix=".log")[1])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment,
            )  # fmt: skip
        self.loaded = self.read()

    def read(self) -> dict[str, float]:
        out: IO[str] = self.process.stdout  # type: ignore[assignment]
        line = out.readline()
        if not line:
            raise SystemExit(f"an engine ended:\n{self.log.read_text()[-3000:]}")
        figures: dict[str, float] = json.loads(line)
        return figures

    def ask(self, row: str) -> dict[str, float]:
        """The figures of one row, and the share of the processors that others had meanwhile."""
        start, busy, own = time.monotonic(), busy_seconds(), self.own_seconds()
        figures = self.exchange(row)
        others = busy_seconds() - busy - (self.own_seconds() - own)
        spent = (time.monotonic() - start) * (os.cpu_count() or 1)
        return figures | {"others": max(0.0, others / spent)}

    def own_seconds(self) -> float:
        """Processor seconds of the engine so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def exchange(self, row: str) -> dict[str, float]:
        questions: IO[str] = self.process.stdin  # type: ignore[assignment]
        questions.write(f"{row}\n")
        questions.flush()
        return self.read()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()
        self.log.unlink()


def gguf_files(args: argparse.Namespace, folder: Path, bits: int) -> Path:
    """llama.cpp's files of a checkpoint, written where they are missing; that of the decoder."""
    files = folder.with_name(f"{folder.name}-gguf")
    text = files / {4: "text-q4_0.gguf", 8: "text-q8_0.gguf", 16: "text-bf16.gguf"}[bits]
    tower = files / f"tower-{args.rival_tower}.gguf"
    if not (text.exists() and tower.exists()):
        python, named = args.rival_python or sys.executable, ["--tower", args.rival_tower]
        writer = [python, str(HERE / "gguf_files.py"), str(folder), str(files), *named]
        subprocess.run(writer, check=True)
        engine = [python, str(HERE / "llama_cpp_engine.py"), str(files), *named]
        subprocess.run([*engine, "--bits", str(bits), "--only-files"], check=True)
    return text


def prepare(args: argparse.Namespace) -> dict[str, list[str]]:
    """Write what the engines read; the command of each."""
    from latency import opsin_image_tokens, picture, write_checkpoint

    work = Path(args.workdir)
    folder = write_checkpoint(args.shape, work / args.shape)
    pixels = work / "picture.rgb"
    pixels.write_bytes(picture().tobytes())
    common = ["--threads", str(args.threads), "--picture", str(pixels)]
    ours = [sys.executable, str(HERE / "opsin_engine.py"), str(folder), *common]
    commands = {"opsin": [*ours, "--bits", str(args.bits)]}
    python, bits = args.rival_python or sys.executable, args.rival_bits or args.bits
    if args.rival == "llama.cpp":
        files = gguf_files(args, folder, bits).parent
        engine = [python, str(HERE / "llama_cpp_engine.py"), str(files), *common]
        commands[args.rival] = [*engine, "--bits", str(bits), "--tower", args.rival_tower]
    elif args.rival:
        runtime = "torch" if args.rival == "transformers" else "openvino"
        engine = [python, str(HERE / "transformers_engine.py"), str(folder), *common]
        engine += ["--runtime", runtime, "--image-tokens", str(opsin_image_tokens(folder))]
        commands[args.rival] = [*engine, "--bits", str(bits)]
    return commands


def models(args: argparse.Namespace) -> dict[str, Any]:
    """Ask every engine for every row in turn; medians and ratios."""
    commands = prepare(args)
    engines = {name: EngineProcess(command, args) for name, command in commands.items()}
    wanted = args.rows.split(",") if args.rows else list(ROWS)
    seen: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    memory: list[float] = []  # GB/s
    for name, engine in engines.items():
        for row in wanted:
            engine.ask(row)  # the first time warms up
        seen[name]["load_s"] = [engine.loaded["load_s"]]
    for turn in range(args.rounds):
        order = list(engines) if turn % 2 == 0 else list(reversed(engines))
        for row in wanted:
            print(f"turn {turn + 1} of {args.rounds}: {row}", file=sys.stderr)
            memory.append(read_bandwidth() / 1e9)
            for name, figures in quietest(args, {name: engines[name] for name in order}, row):
                figures[f"others_{row}"] = figures.pop("others")
                for figure, value in figures.items():
                    seen[name].setdefault(figure, []).append(value)
    tokens = {}
    for name, engine in engines.items():
        if "picture" in wanted:
            tokens[name] = engine.ask("tokens")["prompt_tokens"]
        seen[name]["peak_memory_gb"] = seen[name]["peak_memory_gb"][-1:]
        engine.close()
    limits = {"lowest": min(memory), "median": statistics.median(memory), "highest": max(memory)}
    words = "  ".join(f"{k} {v:.1f}" for k, v in limits.items())
    print(f"{'memory read meanwhile, GB/s':38} {words}")
    return summary(args, seen) | {"prompt_tokens_picture": tokens, "memory_gb_s": limits}


def quietest(
    args: argparse.Namespace, engines: dict[str, EngineProcess], row: str
) -> Iterable[tuple[str, dict[str, float]]]:
    """A turn of every engine while others leave the machine alone, or the best such turn."""
    best: dict[str, dict[str, float]] = {}
    least = math.inf
    for _ in range(args.tries):
        turn = {name: engine.ask(row) for name, engine in engines.items()}
        others = max(figures["others"] for figures in turn.values())
        if others < least:
            best, least = turn, others
        if least <= args.others:
            break
    return best.items()


def summary(args: argparse.Namespace, seen: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians of each engine, and the median of the rounds' ratios (ours over the rival's)."""
    out: dict[str, Any] = {"bench": "cpu models", "shape": args.shape, "bits": args.bits}
    out["rival_bits"] = args.rival_bits or args.bits
    out |= {
        "clock": args.clock,
        "threads": args.threads,
        "rounds": args.rounds,
        "load_average": os.getloadavg(),
    }
    for figure, words in FIGURES.items():
        values = {name: own[figure] for name, own in seen.items() if figure in own}
        entry = {name: statistics.median(own) for name, own in values.items()}
        if len(values) == 2:
            ours, theirs = values.values()
            entry["ratio"] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        if entry:
            out[figure] = entry
            print(f"{words:38}", "  ".join(f"{k} {v:9.3f}" for k, v in entry.items()), flush=True)
    for row in ROWS:
        shares = {
            name: own[f"others_{row}"] for name, own in seen.items() if f"others_{row}" in own
        }
        if shares:
            out[f"others_{row}"] = {n: round(statistics.median(v), 3) for n, v in shares.items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    what = parser.add_subparsers(required=True, dest="what")
    kernels = what.add_parser("kernels")
    kernels.add_argument("--isa", default="auto")
    whole = what.add_parser("models")
    whole.add_argument("--shape", default="smolvlm-256m")
    whole.add_argument("--bits", type=int, choices=[4, 8, 16], default=4)
    whole.add_argument("--rival-bits", type=int, choices=[4, 8, 16], help="where not ours")
    whole.add_argument("--rival", choices=["llama.cpp", "transformers", "openvino"])
    whole.add_argument("--rival-python", help="of the environment that the rival is installed in")
    whole.add_argument("--rival-tower", choices=["f16", "bf16", "q8_0"], default="f16")
    whole.add_argument("--rows", help=f"some of {','.join(ROWS)}")
    whole.add_argument("--others", type=float, default=0.1, help="share of the machine, 0 to 1")
    whole.add_argument("--tries", type=int, default=5)
    whole.add_argument("--workdir", default=Path(tempfile.gettempdir()) / "opsin-bench")
    for each in (kernels, whole):
        each.add_argument("--clock", choices=["wall", "cpu"], default="wall")
        each.add_argument("--threads", type=int, default=2)
        each.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu goes with --threads 1: a thread that waits may work or sleep")
    if args.what == "kernels":
        os.environ[CLOCK] = args.clock
        from cpu_kernels import kernels_report

        print(json.dumps(kernels_report(args.isa, args.threads, args.rounds)))
    else:
        print(json.dumps(models(args)))


if __name__ == "__main__":
    main()
