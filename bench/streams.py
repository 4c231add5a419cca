"""Output tokens a second of many text streams at once, against one alone.

    python bench/streams.py --shape qwen3-vl-2b --streams 16
    python bench/streams.py --model bundled --quant 8

Workload: prompts of 64 tokens, greedy, a fixed number of new tokens; random weights are as fast as
any. While all streams run, a prompt of --long tokens comes in (0 for none): the longest gap that a
stream saw before and during it says what a long prompt costs the others. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 64


class Load:
    """An engine and what its streams have done."""

    def __init__(self, args: argparse.Namespace) -> None:
        from latency import checkpoint_folder

        from opsin.engine.loop import Engine, EngineLimits
        from opsin.engine.model import load_model

        self.model = load_model(checkpoint_folder(args), device=args.device, quantize=args.quant)
        limits = EngineLimits(prefix_cache=False, memory=args.memory, kv_bits=args.kv_bits)
        self.engine = Engine(self.model, None, limits)

    def prompt(self, length: int, seed: int) -> Any:
        """Text tokens that are no other prompt's."""
        from opsin.families.base import Prompt

        ids = [100 + (seed * 31 + i * 7) % 300 for i in range(length)]
        positions, following = self.model.family.positions(ids, [])
        return Prompt(ids, positions, following, [], [])

    def times(self, seed: int, length: int, count: int, into: list[float]) -> None:
        """Run one stream and note when each of its tokens came."""
        from opsin.types import SamplingParams

        sampling = SamplingParams(max_tokens=count, ignore_eos=True)
        for event in self.engine.stream(self.prompt(length, seed), sampling):
            into += [time.perf_counter()] * len(event.token_ids)

    def rate(self, streams: int, count: int) -> float:
        """Tokens a second from the first token of the last stream to the first end of one."""
        noted: list[list[float]] = [[] for _ in range(streams)]
        threads = [
            threading.Thread(target=self.times, args=(i, PROMPT_TOKENS, count, noted[i]))
            for i in range(streams)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        begin, end = max(times[0] for times in noted), min(times[-1] for times in noted)
        return sum(begin < at <= end for times in noted for at in times) / (end - begin)

    def gaps(self, streams: int, count: int, long: int) -> tuple[float, float, float]:
        """Seconds: the longest gap in a stream without and with a long prompt beside it, and the
        time to that prompt's first token.
        """
        noted: list[list[float]] = [[] for _ in range(streams)]
        threads = [
            threading.Thread(target=self.times, args=(i, PROMPT_TOKENS, count, noted[i]))
            for i in range(streams)
        ]
        for thread in threads:
            thread.start()
        while any(len(times) < count // 4 for times in noted):
            time.sleep(0.01)
        arrival = time.perf_counter()
        answer: list[float] = []
        self.times(streams, long, 1, answer)
        for thread in threads:
            thread.join()
        before, beside = 0.0, 0.0
        for times in noted:
            for i in range(1, len(times)):
                gap = times[i] - times[i - 1]
                if arrival < times[i] and times[i - 1] < answer[0]:
                    beside = max(beside, gap)
                elif times[i] <= arrival and i > 1:
                    before = max(before, gap)
        return before, beside, answer[0] - arrival


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `Load` reads."""
    parser.add_argument("--shape", help="a published shape, with random weights")
    parser.add_argument("--model", default="bundled", help="'bundled', a folder or a hub name")
    parser.add_argument("--quant", type=int, help="bits to quantise to while loading")
    parser.add_argument("--kv-bits", type=int)
    parser.add_argument("--device")
    parser.add_argument("--memory", type=int, default=2**30, help="bytes of the cache")
    parser.add_argument("--workdir", default=Path(tempfile.gettempdir()) / "opsin-bench")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_model_flags(parser)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each stream")
    parser.add_argument("--long", type=int, default=512, help="tokens of the long prompt")
    args = parser.parse_args()
    load = Load(args)
    load.rate(1, 4)  # warm up
    alone = max(load.rate(1, args.tokens) for _ in range(2))
    together = max(load.rate(args.streams, args.tokens) for _ in range(2))
    line: dict[str, Any] = {
        "bench": "streams",
        "model": args.shape or args.model,
        "quant": args.quant,
        "kv_bits": args.kv_bits,
        "streams": args.streams,
        "alone_tps": round(alone, 2),
        "together_tps": round(together, 2),
        "ratio": round(together / alone, 2),
    }
    if args.long:
        before, beside, first = load.gaps(args.streams, 2 * args.tokens, args.long)
        line |= {
            "long_prompt_tokens": args.long,
            "longest_gap_s": round(before, 3),
            "longest_gap_beside_long_prompt_s": round(beside, 3),
            "long_prompt_first_token_s": round(first, 3),
        }
    load.engine.close()
    print(json.dumps(line))


if __name__ == "__main__":
    main()
