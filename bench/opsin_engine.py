"""Opsin as an engine of bench/cpu.py: through its own loop, as every user has it.

    python bench/opsin_engine.py CHECKPOINT --bits 4 --threads 2 --picture FILE

Caches across requests are off: every row computes everything.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

import cpu_rows as rows
import torch
from PIL import Image, ImageChops

from opsin.engine.loop import Engine, EngineLimits
from opsin.engine.model import load_model
from opsin.engine.repacking import KEEPER
from opsin.families.base import Prompt
from opsin.types import Event, SamplingParams

SIZE = (1024, 768)


class Opsin:
    """A loaded model behind its engine, and what the rows ask of it."""

    def __init__(self, folder: Path, bits: int, picture: bytes) -> None:
        self.model = load_model(folder, device="cpu", quantize=None if bits == 16 else bits)
        limits = EngineLimits(prefix_cache=False, media_cache=0, max_context=5120, memory=2 << 30)
        self.engine = Engine(self.model, None, limits)
        self.picture = Image.frombytes("RGB", SIZE, picture)
        self.num_tokens = 0

    def moments(self, prompts: list[Prompt], count: int) -> list[list[float]]:
        """When each of `count` tokens of each prompt came; all prompts are submitted at once."""
        times: list[list[float]] = [[] for _ in prompts]
        done = [threading.Event() for _ in prompts]

        def listen(i: int, event: Event) -> None:
            if event.error is not None:
                raise SystemExit(str(event.error))
            times[i].append(rows.now())
            if event.finish_reason is not None:
                done[i].set()

        for i, prompt in enumerate(prompts):
            sampling = SamplingParams(max_tokens=count)
            self.engine.submit(prompt, sampling, lambda event, i=i: listen(i, event))
        for each in done:
            each.wait()
        return times

    def text(self, count: int, start: int = 0) -> Prompt:
        ids = rows.text_ids(count, start)
        positions, following = self.model.family.positions(ids, [])
        return Prompt(ids, positions, following, [], [])

    def row_decode(self) -> rows.Figures:
        times = self.moments([self.text(rows.SHORT)], 1 + rows.NEW_TOKENS)[0]
        return {"decode": rows.rate(times)}

    def row_prefill(self) -> rows.Figures:
        prompt = self.text(rows.PREFILL)
        start = rows.now()
        times = self.moments([prompt], 1)[0]
        return {"prefill": rows.PREFILL / (times[0] - start)}

    def row_streams(self) -> rows.Figures:
        prompts = [self.text(rows.SHORT, s) for s in range(rows.STREAMS)]
        return {"streams": rows.streams_rate(self.moments(prompts, rows.STREAM_TOKENS))}

    def shown(self, count: int) -> Prompt:
        """Some text around so many pictures, each another one."""
        family, token = self.model.family, self.model.config["image_token_id"]
        ids, media = rows.text_ids(10), []
        for i in range(count):
            media.append(family.prepare_image(ImageChops.offset(self.picture, i), {}))
            first = len(ids)
            ids += [token] * media[i].num_tokens
            media[i].indices = torch.arange(first, len(ids))
            ids += rows.text_ids(10, 1 + i)
        positions, following = family.positions(ids, media)
        return Prompt(ids, positions, following, media, family.atomic_spans(ids, media))

    def row_picture(self) -> rows.Figures:
        start = rows.now()
        prompt = self.shown(1)
        self.num_tokens = len(prompt.token_ids)
        times = self.moments([prompt], 1 + rows.AFTER_PICTURE)[0]
        return {"ttft_picture": times[0] - start, "decode_picture": rows.rate(times)}

    def row_pictures(self) -> rows.Figures:
        prompt = self.shown(rows.PICTURES)
        start = rows.now()
        return {"ttft_pictures": self.moments([prompt], 1)[0][0] - start}

    def row_tokens(self) -> rows.Figures:
        return {"prompt_tokens": self.num_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, choices=[4, 8, 16], default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = rows.now()
    engine = Opsin(args.folder, args.bits, args.picture.read_bytes())
    load_seconds = rows.since(start)
    for thread in threading.enumerate():
        if thread.name == KEEPER:
            thread.join()  # a first load's file is written beside what follows
    names = ("decode", "prefill", "streams", "picture", "pictures", "tokens")
    rows.answer({name: getattr(engine, f"row_{name}") for name in names}, load_seconds)
    engine.engine.close()


if __name__ == "__main__":
    main()
