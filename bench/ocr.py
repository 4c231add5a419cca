"""Measures `opsin ocr` over a PDF made on the spot: pages a second, and time outside the model.

The model is at work while a step or a tower runs for the engine; what is left of the wall clock is
opening, drawing and preprocessing pages and writing texts that no step ran beside. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image, ImageDraw, ImageFont  # noqa: E402

WORDS = "river stone garden paper window seven market yellow letter north bread silver"


def page(number: int, lines: int) -> Image.Image:
    """A page of short lines, 960x600 pixels: a card of 6.4 by 4 inches at 150 dots per inch."""
    chosen = random.Random(number)
    image = Image.new("RGB", (960, 600), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(34)
    for line in range(lines):
        words = " ".join(chosen.choices(WORDS.split(), k=4))
        draw.text((40, 30 + line * 52), f"{number} {words}", "black", font)
    return image


def paper(pages: int, lines: int) -> bytes:
    """A PDF of so many pages."""
    first, *rest = [page(number, lines) for number in range(1, pages + 1)]
    buffer = io.BytesIO()
    first.save(buffer, "PDF", save_all=True, append_images=rest, resolution=150, quality=95)
    return buffer.getvalue()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One run of the command's own code over the paper."""
    import opsin
    from opsin.api import engine_for
    from opsin.cli.ocr import Run, Target
    from opsin.cli.ocr_opening import Opening
    from opsin.cli.ocr_reading import Asking, Reader
    from opsin.cli.ocr_sources import find_sources

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "paper.pdf"
        path.write_bytes(paper(args.pages, args.lines))
        sources = find_sources([str(path)])
        target = Target.of(Path(folder) / "out", "md,json", sources)
        with Opening(target.surely_read(sources[0])) as opening:
            model, processor = opsin.load(args.model, device=args.device)
            opsin.generate(model, processor, "Read the text.", page(0, 2), max_tokens=8)
            engine, at_work = engine_for(model, processor), [0.0]
            engine.runner.run = timed(engine.runner.run, at_work)
            engine.encoder.ready = timed(engine.encoder.ready, at_work)
            options = {"max_tokens": args.max_tokens, "processor_kwargs": None}
            asking = Asking.of(processor, args.prompt, args.task, options)
            reader = Reader(model, processor, asking)
            run = Run(reader, target, args.model, [args.model], args.dpi, None)
            cpu = time.process_time()
            report = run.all(sources, args.concurrency, opening)
            cpu = time.process_time() - cpu
        held = json.loads((Path(folder) / "out" / "paper.json").read_text(encoding="utf-8"))
    tokens = sum(each["tokens"] for each in held["pages"])
    outside = 1 - at_work[0] / report.seconds
    alike = [
        SequenceMatcher(None, each["text"], expected(each["page"], args.lines), False).ratio()
        for each in held["pages"]
    ]
    return {
        "bench": "ocr",
        "model": args.model,
        "pages": report.read,
        "failed": len(report.errors),
        "seconds": round(report.seconds, 2),
        "pages_per_second": round(report.read / report.seconds, 2),
        "tokens_per_second": round(tokens / report.seconds, 1),
        "outside_the_model": round(outside, 4),
        "cpu_seconds": round(cpu, 2),
        "concurrency": args.concurrency,
        "characters_right": round(sum(alike) / max(1, len(alike)), 4),
    }


def timed(work: Callable[[Any], Any], seconds: list[float]) -> Callable[[Any], Any]:
    """The same work, its time added to `seconds`."""

    def run(step: Any) -> Any:
        start = time.perf_counter()
        try:
            return work(step)
        finally:
            seconds[0] += time.perf_counter() - start

    return run


def expected(number: int, lines: int) -> str:
    """The text of a page."""
    chosen = random.Random(number)
    return "\n".join(
        f"{number} {' '.join(chosen.choices(WORDS.split(), k=4))}" for _ in range(lines)
    )


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", "-m", default="bundled")
    parser.add_argument("--device")
    parser.add_argument("--pages", type=int, default=100)
    parser.add_argument("--lines", type=int, default=8)
    parser.add_argument("--dpi", type=float, default=150.0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--task")
    parser.add_argument("--prompt")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
