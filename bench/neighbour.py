"""What a big picture costs the text streams beside it: p50, p99 and longest gap between tokens.

    python bench/neighbour.py --shape qwen3-vl-2b --picture 1024x768 --streams 4

Workload: greedy text streams of random weights, into which a question about one picture comes; once
with its tower in slices, as the engine does it, and once whole (--rounds each, in turn; medians).
The picture's time to its first token says what the slices cost it. One JSON line at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import threading
import time
from itertools import pairwise
from typing import Any

from streams import PROMPT_TOKENS, Load, add_model_flags

ENDLESS = 100_000


def shown(load: Load, size: tuple[int, int], seed: int) -> Any:
    """A prompt with one picture of noise, which no other prompt has."""
    import numpy as np
    import torch
    from PIL import Image

    from opsin.families.base import Prompt

    family, token = load.model.family, load.model.config["image_token_id"]
    noise = np.random.default_rng(seed).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    item = family.prepare_image(Image.fromarray(noise).resize(size), {})
    ids = [*range(100, 110), *[token] * item.num_tokens, *range(110, 120)]
    item.indices = (torch.tensor(ids) == token).nonzero().flatten()
    positions, following = family.positions(ids, [item])
    return Prompt(ids, positions, following, [item], family.atomic_spans(ids, [item]))


def beside(load: Load, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One picture beside the streams; milliseconds, and seconds of its first token."""
    from opsin.types import SamplingParams

    noted: list[list[float]] = [[] for _ in range(args.streams)]
    sampling = SamplingParams(max_tokens=ENDLESS, ignore_eos=True)
    open_streams = [
        load.engine.stream(load.prompt(PROMPT_TOKENS, seed * 100 + i), sampling)
        for i in range(args.streams)
    ]

    def read(i: int) -> None:
        for event in open_streams[i]:
            noted[i] += [time.perf_counter()] * len(event.token_ids)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(args.streams)]
    for thread in threads:
        thread.start()
    while any(len(times) < args.before for times in noted):
        time.sleep(0.01)
    prompt = shown(load, args.picture, seed)
    arrival = time.perf_counter()
    picture = load.engine.stream(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    timings = next(event.timings for event in picture if event.timings is not None)
    answered = time.perf_counter()
    for stream in open_streams:
        stream.close()
    for thread in threads:
        thread.join()
    pairs = [pair for times in noted for pair in pairwise(times[4:])]
    quiet = [after - first for first, after in pairs if after <= arrival]
    busy = [after - first for first, after in pairs if after > arrival and first < answered]
    return {
        **{f"quiet_{name}_ms": value for name, value in spread(quiet).items()},
        **{f"beside_{name}_ms": value for name, value in spread(busy).items()},
        "picture_first_token_s": answered - arrival,
        "picture_encode_s": timings.encode,
        "tokens_beside": len(busy),
    }


def spread(gaps: list[float]) -> dict[str, float]:
    """Gaps in milliseconds: p50, p99 and the longest."""
    ordered = sorted(gaps) or [0.0]
    at = {"p50": 0.5, "p99": 0.99, "longest": 1.0}
    last = len(ordered)
    return {name: 1000 * ordered[max(0, math.ceil(p * last) - 1)] for name, p in at.items()}


def main() -> None:
    """Command line."""
    from opsin.engine import encoding

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_model_flags(parser)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--before", type=int, default=24, help="tokens of each before the picture")
    parser.add_argument("--picture", default="1024x768")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    width, _, height = args.picture.partition("x")
    args.picture = (int(width), int(height))
    load = Load(args)
    slices = {"sliced": encoding.SLICE_SECONDS, "whole": math.inf}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in slices}
    for i in range(args.rounds + 1):
        for name, seconds in slices.items():
            encoding.SLICE_SECONDS = seconds
            figures = beside(load, args, 2 * i + (name == "whole"))
            found[name] += [figures] if i else []  # the first round warms up
    load.engine.close()
    line: dict[str, Any] = {"bench": "neighbour", "model": args.shape or args.model}
    line |= {"streams": args.streams, "picture": args.picture, "load": os.getloadavg()[0]}
    for name, rounds in found.items():
        line[name] = {
            key: round(statistics.median(each[key] for each in rounds), 2) for key in rounds[0]
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
