"""Time to first token of the first and the second question about a picture.

    python bench/cache.py                            the bundled model
    python bench/cache.py --shape qwen3-vl-2b        a published shape with random weights

Workload: a 1024x768 picture as a data URL, one new token; the second question differs from the
first, so that it shares the picture and what stands before it. Every round asks about a picture
that was never seen. Medians are printed, and one JSON line at the end.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

SIZE = (1024, 768)
QUESTIONS = ("What is shown here? Describe all of it.", "How many colours are there?")


def picture(seed: int) -> str:
    """A picture with detail, as a PNG in a data URL."""
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(seed).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).resize(SIZE).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class Asked:
    """A loaded model, asked through its whole processor or, without a tokenizer, past the text."""

    def __init__(self, args: argparse.Namespace) -> None:
        from opsin.engine.loop import Engine, EngineLimits

        if args.shape:
            from latency import write_checkpoint

            from opsin.engine.model import load_model

            folder = write_checkpoint(args.shape, Path(args.workdir) / args.shape)
            self.model, self.processor = load_model(folder, device=args.device), None
        else:
            import opsin

            self.model, self.processor = opsin.load(args.model, device=args.device)
        self.engine = Engine(self.model, self.processor, EngineLimits(memory=args.memory))
        self.medium = _Media(self.model.family)

    def prompt(self, source: str, question: str) -> Any:
        """A question about a picture, ready for the engine."""
        if self.processor is not None:
            return self.processor.prepare(question, images=[source])
        import torch

        from opsin.families.base import Prompt

        token, family = self.model.config["image_token_id"], self.model.family
        media = [self.medium.ready(source)]
        ids = [*range(100, 110), *[token] * media[0].num_tokens, *question.encode()]
        media[0].indices = (torch.tensor(ids) == token).nonzero().flatten()
        positions, following = family.positions(ids, media)
        return Prompt(ids, positions, following, media, family.atomic_spans(ids, media))

    def first_token(self, source: str, question: str) -> tuple[float, Any]:
        """Seconds from the question to its first token, and the answer's last event."""
        from opsin.types import SamplingParams

        begin = time.perf_counter()
        prompt = self.prompt(source, question)
        events = list(self.engine.stream(prompt, SamplingParams(max_tokens=1)))
        return time.perf_counter() - begin, events[-1]


class _Media:
    """The processor's way with pictures, for a checkpoint that has no tokenizer."""

    def __init__(self, family: Any) -> None:
        from opsin.engine.prepared_cache import PreparedCache

        self.family = family
        self.prepared = PreparedCache()

    def ready(self, source: str) -> Any:
        """A picture made ready, or found ready."""
        from opsin.engine.prepared_cache import prepared_key
        from opsin.families.base import MediaInput
        from opsin.media.fetched import FetchedCache
        from opsin.media.key import image_key
        from opsin.media.loading import load
        from opsin.media.memory import Memory
        from opsin.types import Media

        def recall(digest: bytes) -> MediaInput | None:
            return self.prepared.get(prepared_key(b"", digest), with_picture=False)

        memory = Memory(FetchedCache(), b"", recall)
        value = load(Media("image", source), memory=memory).value
        if isinstance(value, MediaInput):
            return value
        ready = self.family.prepare_image(value, {})
        ready.key = image_key(value)
        self.prepared.put(prepared_key(b"", memory.digest), ready)
        return ready


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="bundled", help="'bundled', a folder or a hub name")
    parser.add_argument("--shape", help="a published shape, with random weights")
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, default=2**30, help="bytes of the cache")
    parser.add_argument("--workdir", default=Path(tempfile.gettempdir()) / "opsin-bench")
    args = parser.parse_args()
    asked = Asked(args)
    asked.first_token(picture(0), QUESTIONS[0])  # warm up
    rounds: list[tuple[float, float]] = []
    for seed in range(1, args.rounds + 1):
        source = picture(seed)
        first, _ = asked.first_token(source, QUESTIONS[0])
        second, last = asked.first_token(source, QUESTIONS[1])
        rounds.append((first, second))
        print(f"first {first * 1000:9.1f} ms   second {second * 1000:9.1f} ms", flush=True)
    asked.engine.close()
    first, second = (statistics.median(values) for values in zip(*rounds, strict=True))
    line = {
        "bench": "cache",
        "model": args.shape or args.model,
        "picture": list(SIZE),
        "prompt_tokens": last.usage.prompt_tokens,
        "cached_tokens": last.usage.cached_tokens,
        "rounds": args.rounds,
        "first_s": round(first, 5),
        "second_s": round(second, 5),
        "ratio": round(first / second, 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
