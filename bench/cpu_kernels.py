"""The kernels part of bench/cpu.py: native kernels, torch's, and this machine's own limits.

Every round measures each case once, so that a noisy machine disturbs all alike; medians, and ratios
to the limits of the same rounds.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from cpu_rows import CLOCK, now

from opsin.kernels.cpu import Library, PackedMatrix, load, why_missing

N, K = 6144, 2048
RING_BYTES = 128 << 20
FEW = (1, 2, 4, 8, 16)
MANY = (64, 512)


class Ring:
    """Matrices of one kind, taken in turn."""

    def __init__(self, library: Library, kind: str, weight: torch.Tensor) -> None:
        first = PackedMatrix.dense(library, weight, kind)  # type: ignore[arg-type]
        count = max(2, RING_BYTES // first.nbytes)
        rest = [PackedMatrix(library, kind, N, K) for _ in range(count - 1)]  # type: ignore[arg-type]
        for matrix in rest:
            matrix.fill(weight)
        self.matrices = [first, *rest]
        self.at = 0

    def run(self, x: torch.Tensor) -> int:
        """Multiply by the next matrix; bytes read."""
        self.at = (self.at + 1) % len(self.matrices)
        matrix = self.matrices[self.at]
        matrix.multiply(x)
        return matrix.nbytes


def clock(work: Callable[[], int], least: float = 0.03) -> tuple[float, int]:
    """Seconds of one call and the bytes it says it read, averaged over at least `least` seconds."""
    calls, total = 0, 0
    start = now()
    while (spent := now() - start) < least or calls < 2:
        total += work()
        calls += 1
    return spent / calls, total // calls


def read_limit(library: Library) -> float:
    """Bytes a second that this machine reads, by the same clock as everything else."""
    if os.environ.get(CLOCK) != "cpu":
        return library.read_bandwidth(RING_BYTES, 1)
    spent = []
    for repeats in (1, 1, 41):  # the memory is filled once, whatever the number
        start = now()
        library.read_bandwidth(RING_BYTES, repeats)
        spent.append(now() - start)
    return 40 * RING_BYTES / (spent[2] - spent[1])


def torch_cases(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], int]]:
    """Torch's kernels for the same product, each over a ring of its own."""
    dense = [weight.bfloat16().clone() for _ in range(RING_BYTES // (2 * N * K))]
    codes = torch.randint(-127, 127, (N, K), dtype=torch.int8)
    int8 = [codes.clone() for _ in range(RING_BYTES // (N * K))]
    scales = torch.ones(N, dtype=torch.bfloat16)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (N, K), dtype=torch.int32), 2
    )
    int4 = [packed.clone() for _ in range(RING_BYTES // (N * K // 2))]
    zeros = torch.ones(K // 64, N, 2, dtype=torch.bfloat16)
    turn = {"at": 0}

    def pick(ring: list[torch.Tensor]) -> torch.Tensor:
        turn["at"] += 1
        return ring[turn["at"] % len(ring)]

    def linear(x: torch.Tensor) -> int:
        w = pick(dense)
        torch.nn.functional.linear(x, w)
        return w.nbytes

    def eight(x: torch.Tensor) -> int:
        w = pick(int8)
        torch._weight_int8pack_mm(x, w, scales)
        return w.nbytes

    def four(x: torch.Tensor) -> int:
        w = pick(int4)
        torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 64, zeros)
        return w.nbytes

    return {"torch bf16": linear, "torch int8": eight, "torch int4": four}


def attention_cases(library: Library) -> dict[str, Callable[[], int]]:
    """Decode over 1024 cached tokens and a tower's 1024 patches; the numbers are operations."""
    q, k, v = (torch.randn(1024, h, 64).bfloat16() for h in (12, 12, 12))
    work = 4 * 1024 * 1024 * 12 * 64

    def ours() -> int:
        library.dense_attention(q, k, v, [1024], scale=0.125)
        return work

    def theirs() -> int:
        a, b, c = (x.transpose(0, 1)[None] for x in (q, k, v))
        torch.nn.functional.scaled_dot_product_attention(a, b, c, scale=0.125)
        return work

    return {"attention 1024x1024": ours, "torch attention 1024x1024": theirs}


def measure(library: Library, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds, GB/s and GOP/s of every case, with the limits of the same rounds."""
    weight = torch.randn(N, K) * 0.02
    rings: dict[str, Callable[[torch.Tensor], int]] = {
        kind: Ring(library, kind, weight).run for kind in ("q4", "q5", "q6", "q8", "bf13", "bf16")
    }
    rings |= torch_cases(weight)
    inputs = {m: torch.randn(m, K).bfloat16() for m in (*FEW, *MANY)}
    times: dict[str, list[tuple[float, int]]] = {}
    limits: dict[str, list[float]] = {}
    attention = attention_cases(library)
    for _ in range(rounds):
        limits.setdefault("read", []).append(read_limit(library))
        for kind in ("bf16", "int8"):
            limits.setdefault(kind, []).append(library.peak(kind, 10))
        for m, x in inputs.items():
            for name, run in rings.items():
                if m > 64 and name in ("torch int8", "torch int4"):
                    continue  # seconds a call
                times.setdefault(f"{name} M={m}", []).append(clock(lambda r=run, x=x: r(x)))  # type: ignore[misc]
        for name, case in attention.items():
            times.setdefault(name, []).append(clock(case))
    out: dict[str, dict[str, float]] = {
        "limit": {
            "read GB/s": statistics.median(limits["read"]) / 1e9,
            "bf16 GOP/s": statistics.median(limits["bf16"]) / 1e9,
            "int8 GOP/s": statistics.median(limits["int8"]) / 1e9,
        }
    }
    for name, values in times.items():
        seconds = statistics.median(v[0] for v in values)
        if "attention" in name:
            out[name] = {"ms": seconds * 1e3, "GOP/s": values[0][1] / seconds / 1e9}
            continue
        rows = int(name.rsplit("=", 1)[1])
        shares = [v[1] / v[0] / read for v, read in zip(values, limits["read"], strict=True)]
        out[name] = {
            "ms": seconds * 1e3,
            "GB/s": values[0][1] / seconds / 1e9,
            "share of read": statistics.median(shares),
            "GOP/s": 2.0 * N * K * rows / seconds / 1e9,
        }
    return out


def kernels_report(isa: str, threads: int, rounds: int) -> dict[str, Any]:
    """Print a table; what bench/cpu.py prints as JSON."""
    library = load(isa, threads)
    if library is None:
        raise SystemExit(f"no native kernels: {why_missing()}")
    torch.set_num_threads(library.threads)
    result = measure(library, rounds)
    print(f"{library.isa}, {library.threads} threads, weights {N} x {K}")
    for name, values in result.items():
        print(f"{name:28}", "  ".join(f"{k} {v:9.3f}" for k, v in values.items()))
    facts = {"isa": library.isa, "threads": library.threads, "load_average": os.getloadavg()}
    return {"bench": "cpu kernels", **facts, "cases": result}
