"""Decode rate with and without n-gram speculation, on texts that repeat and texts that do not.

    python bench/speculation.py
    python bench/speculation.py --shape smolvlm-256m --quant 8 --streams 2

Workload: a prompt of --prompt tokens and an answer of --tokens, whose tokens are laid down: the
model computes every step, and what it would have said is overruled. So any weights show what a text
costs. "repeats": the answer copies the prompt again and again. "fresh": no pair of tokens comes
twice. "misleading": every pair comes again and again, each time with another token behind it, the
worst there is for guesses. With and without take turns, round by round; medians of the rounds'
ratios, and the ratio of the fastest rounds, are printed, and one JSON line at the end. On a machine
that does other work too, --cpu-time counts the process's own seconds, which say something with
OPSIN_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LOWEST = 100  # the tokens below are left out, as many of them stand for something


class Spoken:
    """A logits processor that makes an answer the tokens laid down for it."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer

    def __call__(self, logits: Tensor, token_ids: Sequence[int], num_prompt: int) -> Tensor:
        """Leave only the token whose turn it is."""
        logits.fill_(-float("inf"))
        logits[self.answer[len(token_ids) - num_prompt]] = 0
        return logits


def text(kind: str, length: int, words: int, seed: int) -> list[int]:
    """So many tokens of one kind of text, of `words` different ones at most."""
    generator = random.Random(seed)
    if kind == "fresh":  # steps of every size in turn: no step, so no pair, comes twice
        tokens, step = [LOWEST], 0
        while len(tokens) < length:
            step += 1
            tokens.append(LOWEST + (tokens[-1] - LOWEST + step) % words)
        return tokens
    if kind == "misleading":
        pairs = [(LOWEST + 2 * i, LOWEST + 2 * i + 1) for i in range(4)]
        made: list[int] = []
        while len(made) < length:
            made += [*generator.choice(pairs), LOWEST + 8 + len(made) % (words - 8)]
        return made[:length]
    return [LOWEST + generator.randrange(words) for _ in range(length)]


class Runs:
    """Two engines over one model, without speculation and with it."""

    def __init__(self, args: argparse.Namespace) -> None:
        from latency import checkpoint_folder

        from opsin.engine.loop import Engine, EngineLimits
        from opsin.engine.model import load_model

        self.args = args
        self.clock = time.process_time if args.cpu_time else time.perf_counter
        self.model = load_model(checkpoint_folder(args), device=args.device, quantize=args.quant)
        self.engines = {
            with_guesses: Engine(
                self.model,
                None,
                EngineLimits(
                    prefix_cache=False,
                    memory=args.memory,
                    speculative="ngram" if with_guesses else None,
                ),
            )
            for with_guesses in (False, True)
        }

    def stream(self, with_guesses: bool, kind: str, seed: int, into: list[Any]) -> None:
        """Run one stream; when its tokens came, and its usage."""
        from opsin.families.base import Prompt
        from opsin.types import SamplingParams

        args = self.args
        words = self.model.decoder.config.vocab_size - LOWEST
        whole = text(kind, args.prompt + args.tokens, words, seed)
        if kind == "repeats":
            whole = (whole[: args.prompt] * (2 + args.tokens // args.prompt))[: len(whole)]
        prompt, answer = whole[: args.prompt], whole[args.prompt :]
        positions, following = self.model.family.positions(prompt, [])
        events = self.engines[with_guesses].stream(
            Prompt(prompt, positions, following, [], []),
            SamplingParams(max_tokens=len(answer), ignore_eos=True),
            [Spoken(answer)],
        )
        times: list[float] = []
        said: list[int] = []
        for event in events:
            times += [self.clock()] * len(event.token_ids)
            said += event.token_ids
        assert said == answer
        into.append((times, event.usage))

    def rate(self, with_guesses: bool, kind: str, seed: int) -> tuple[float, float, float]:
        """Tokens a second after each stream's first, guesses computed and accepted a token."""
        done: list[Any] = []
        threads = [
            threading.Thread(target=self.stream, args=(with_guesses, kind, seed + i, done))
            for i in range(self.args.streams)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        begin = min(times[0] for times, _ in done)
        end = max(times[-1] for times, _ in done)
        tokens = sum(len(times) - 1 for times, _ in done)
        drafted = sum(usage.drafted_tokens for _, usage in done)
        accepted = sum(usage.accepted_tokens for _, usage in done)
        return tokens / (end - begin), drafted / tokens, accepted / tokens

    def compare(self, kind: str) -> dict[str, float]:
        """The figures of one kind of text."""
        plain, guessed = [], []
        for number in range(self.args.rounds + 1):
            order = (False, True) if number % 2 else (True, False)
            figures = {way: self.rate(way, kind, 1000 * number) for way in order}
            plain.append(figures[False])
            guessed.append(figures[True])
        plain, guessed = plain[1:], guessed[1:]  # the first round warms up
        ratios = [b[0] / a[0] for a, b in zip(plain, guessed, strict=True)]
        return {
            "plain_tps": statistics.median(r[0] for r in plain),
            "ngram_tps": statistics.median(r[0] for r in guessed),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "ratio_of_fastest": max(r[0] for r in guessed) / max(r[0] for r in plain),
            "drafted_per_token": statistics.median(r[1] for r in guessed),
            "accepted_per_token": statistics.median(r[2] for r in guessed),
        }

    def costs(self) -> dict[str, float]:
        """By how much the last guesses lengthened a step of one request, by their number."""
        speculator = self.engines[True].speculator
        assert speculator is not None
        known = speculator.costs._more.get(self.args.streams, {})
        return {str(guesses): round(share, 3) for guesses, share in sorted(known.items())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", help="a published shape, with random weights")
    parser.add_argument("--model", default="bundled", help="a checkpoint folder or hub name")
    parser.add_argument("--device")
    parser.add_argument("--quant", type=int)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=2**28)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--kinds", nargs="+", default=["repeats", "fresh", "misleading"])
    parser.add_argument("--workdir", default=Path(tempfile.gettempdir()) / "opsin-bench")
    args = parser.parse_args()
    runs = Runs(args)
    line: dict[str, Any] = {
        "bench": "speculation",
        "model": args.shape or args.model,
        "quant": args.quant,
        "streams": args.streams,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "clock": "cpu" if args.cpu_time else "wall",
        "load": os.getloadavg()[0],
    }
    for kind in args.kinds:
        figures = runs.compare(kind)
        print(
            f"{kind:<12}{figures['plain_tps']:8.1f} tokens/s, with guesses "
            f"{figures['ngram_tps']:8.1f}: {figures['ratio']:.2f} times "
            f"({figures['lowest']:.2f} to {figures['highest']:.2f}; "
            f"{figures['ratio_of_fastest']:.2f} for the fastest rounds); of 100 tokens "
            f"{100 * figures['accepted_per_token']:.0f} were guessed, "
            f"{100 * figures['drafted_per_token']:.0f} guesses computed"
        )
        line[kind] = figures
    line["costs"] = runs.costs()
    for engine in runs.engines.values():
        engine.close()
    print(json.dumps(line))


if __name__ == "__main__":
    main()
