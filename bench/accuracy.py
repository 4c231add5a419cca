"""Measures what a model reads, counts and locates on the bundled model's held-out pictures.

The pictures come from training/bundled by seed, with fonts and words that training never saw
(training/bundled/README.md lists the font packages). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from training.bundled import fonts, scoring, tasks  # noqa: E402

Answer = Callable[[list[list[Image.Image]], list[str]], list[str]]
BUNDLED = ROOT / "opsin" / "models" / "bundled"


def opsin_answers(args: argparse.Namespace) -> Answer:
    """Answers through Opsin itself."""
    import opsin

    chosen = {"quantize": args.quant, "device": args.device}
    given = {name: value for name, value in chosen.items() if value is not None}
    model, processor = opsin.load(args.model, **given)
    cache = {"kv_bits": args.kv_bits, "kv_group_size": args.kv_group_size}
    cache |= {"quantized_kv_start": args.quantized_kv_start, "max_kv_size": args.max_kv_size}

    def answer(images: list[list[Image.Image]], questions: list[str]) -> list[str]:
        results = opsin.batch_generate(
            model,
            processor,
            images=[pictures[0] if len(pictures) == 1 else pictures for pictures in images],
            prompts=questions,
            max_tokens=args.max_tokens,
            temperature=0.0,
            **cache,
        )
        return [result.text for result in results]

    return answer


def transformers_answers(args: argparse.Namespace) -> Answer:
    """Answers through Transformers: the reference."""
    from training.bundled.engine import TransformersEngine

    if args.quant is not None or args.kv_bits is not None or args.max_kv_size is not None:
        raise SystemExit("--quant, --kv-bits and --max-kv-size need --engine opsin")
    folder = str(BUNDLED) if args.model == "bundled" else args.model
    engine = TransformersEngine(folder, args.device or "cpu")
    return lambda images, questions: engine.answer(images, questions, args.max_tokens)


def measure(answer: Answer, args: argparse.Namespace) -> dict[str, Any]:
    """Scores of every suite asked for."""
    scores: dict[str, Any] = {}
    for suite in args.suites:
        kind, _ = scoring.SUITES[suite]
        above, below, wrong = 0.0, 0.0, []
        begun = time.monotonic()
        for first in range(0, args.samples, args.batch):
            count = min(args.batch, args.samples - first)
            samples = [tasks.held_out_sample(kind, first + i, args.seed) for i in range(count)]
            turns = [scoring.asked(sample, suite) for sample in samples]
            images = [[picture.image() for picture in sample.pictures] for sample in samples]
            got = answer(images, [turn.question for turn in turns])
            for turn, text in zip(turns, got, strict=True):
                part, whole = scoring.tally(turn, text)
                above, below = above + part, below + whole
                if turn.metric in ("exact", "cer") and part != (
                    whole if turn.metric == "exact" else 0
                ):
                    wrong.append((turn.question, turn.answer, text))
        scores[suite] = round(above / below, 4)
        seconds = time.monotonic() - begun
        print(
            f"{suite:24} {scores[suite]:.4f}   target {scoring.TARGETS[suite]}   {seconds:.0f} s",
            flush=True,
        )
        for question, truth, text in wrong[: args.show]:
            print(f"    {question!r}: {text!r}, should be {truth!r}")
    return scores


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="'bundled', a folder or a hub name")
    parser.add_argument("--quant", type=int, default=None, help="bits to quantise to while loading")
    parser.add_argument("--kv-bits", type=int, default=None, help="bits of the cache: 16, 8 or 4")
    parser.add_argument("--kv-group-size", type=int, default=64)
    parser.add_argument("--quantized-kv-start", type=int, default=0)
    parser.add_argument("--max-kv-size", type=int, default=None)
    parser.add_argument("--device", default=None)
    parser.add_argument("--engine", choices=("opsin", "transformers"), default="opsin")
    parser.add_argument("--samples", type=int, default=200, help="pictures for each score")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--max-tokens", type=int, default=640)
    parser.add_argument(
        "--suites", nargs="+", default=list(scoring.SUITES), choices=list(scoring.SUITES)
    )
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print for each score")
    args = parser.parse_args()
    faces = fonts.faces("heldout")
    answer = opsin_answers(args) if args.engine == "opsin" else transformers_answers(args)
    begun = time.monotonic()
    scores = measure(answer, args)
    result = {
        "bench": "accuracy",
        "model": args.model,
        "quant": args.quant,
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size if args.kv_bits else None,
        "quantized_kv_start": args.quantized_kv_start if args.kv_bits else None,
        "max_kv_size": args.max_kv_size,
        "device": args.device,
        "engine": args.engine,
        "samples": args.samples,
        "seed": args.seed,
        "held_out_faces": len(faces),
        "seconds": round(time.monotonic() - begun, 1),
        "scores": scores,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
