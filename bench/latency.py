"""Time to first token, decode rate, load time and peak memory, alone or beside Transformers.

    python bench/latency.py --shape smolvlm-256m --rival transformers
    python bench/latency.py --model HuggingFaceTB/SmolVLM-256M-Instruct

Workload: one 1024x768 picture and about 20 text tokens, greedy, a fixed number of new tokens. With
--shape, a checkpoint of that model's true shape with random weights is written to --workdir once:
speed does not depend on the values. Every measurement runs in a process of its own, ours and the
rival's in turn; medians are printed, and one JSON line at the end.

Loading is counted honestly where a rival maps its weights and reads them later: load_s is until the
model is there, ready_s until it has answered 20 tokens of text with one of its own, and ready_cpu_s
and ready_faults the processor's seconds and the page faults of that. --quant and --repacked-cache
are ours alone; what is kept (in the user's cache folder, if nothing else is named) shows from the
second round on.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS, NEW_TOKENS, TEXT_TOKENS = 3, 32, 20
Run = Callable[[bool, int], float]


class Loading:
    """What loading costs, from when this is made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.usage = resource.getrusage(resource.RUSAGE_SELF)

    def figures(self, run: Run) -> dict[str, float]:
        """Call when the model is there, before anything else runs."""
        load = time.perf_counter() - self.started
        run(False, 1)
        before, now = self.usage, resource.getrusage(resource.RUSAGE_SELF)
        return {
            "load_s": load,
            "ready_s": time.perf_counter() - self.started,
            "ready_cpu_s": now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime,
            "ready_faults": now.ru_minflt - before.ru_minflt,
            "ready_peak_memory_gb": now.ru_maxrss * 1024 / 1e9,
        }


def write_checkpoint(shape: str, folder: Path) -> Path:
    """A checkpoint folder of a published shape with random weights, written once."""
    import torch
    import transformers
    from shapes import SHAPES

    if (folder / "model.safetensors").exists() or list(folder.glob("*.index.json")):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config, processor = SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(config))
    model_class = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        model = model_class(transformers.AutoConfig.from_pretrained(folder)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def checkpoint_folder(args: argparse.Namespace) -> Path:
    """The folder of the checkpoint that --shape or --model names."""
    from opsin.checkpoint.hub import resolve

    if args.shape:
        return write_checkpoint(args.shape, Path(args.workdir) / args.shape)
    return resolve(args.model or "bundled")


def picture() -> Any:
    """A 1024x768 picture with detail."""
    import numpy as np
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((1024, 768))


def token_ids(image_token: int, count: int) -> list[int]:
    """Some text tokens around a picture's."""
    return [*range(100, 110), *[image_token] * count, *range(110, 100 + TEXT_TOKENS)]


def measure_opsin(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Our figures, through the engine as every user has it."""
    import torch

    from opsin.engine.loop import Engine, EngineLimits
    from opsin.engine.model import load_model
    from opsin.families.base import Prompt
    from opsin.types import SamplingParams

    loading = Loading()
    model = load_model(
        folder,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quant,
        repacked_cache=args.repacked_cache,
    )
    # Caches across requests are off: every run computes everything.
    engine = Engine(model, None, EngineLimits(prefix_cache=False, media_cache=0))
    image_token = model.config["image_token_id"]

    def prompt(with_image: bool) -> Prompt:
        media = [model.family.prepare_image(picture(), {})] if with_image else []
        ids = token_ids(image_token, media[0].num_tokens if media else 0)
        if media:
            media[0].indices = (torch.tensor(ids) == image_token).nonzero().flatten()
        positions, following = model.family.positions(ids, media)
        return Prompt(ids, positions, following, media, model.family.atomic_spans(ids, media))

    def run(with_image: bool, count: int) -> float:
        begin = time.perf_counter()
        for _ in engine.stream(prompt(with_image), SamplingParams(max_tokens=count)):
            pass
        return time.perf_counter() - begin

    figures = loading.figures(run)
    if not args.only_load:
        figures |= timed(run)
    engine.close()
    return figures


def measure_transformers(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """The same through the Transformers class, in the same dtype."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    loading = Loading()
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, args.dtype or "bfloat16")
    ).to(args.device or "cpu")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    image_token = model.config.image_token_id
    count = 0 if args.only_load else opsin_image_tokens(folder)

    def run(with_image: bool, new_tokens: int) -> float:
        begin = time.perf_counter()
        ids = torch.tensor([token_ids(image_token, count if with_image else 0)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if with_image:
            pixels = processor(images=[picture()], return_tensors="pt")
            inputs |= {k: v for k, v in pixels.items() if k not in ("rows", "cols")}
            if model.config.model_type.startswith("qwen"):
                inputs["mm_token_type_ids"] = (ids == image_token).int()
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        with torch.inference_mode():
            model.generate(
                **inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )
        return time.perf_counter() - begin

    figures = loading.figures(run)
    return figures if args.only_load else figures | timed(run)


def opsin_image_tokens(folder: Path) -> int:
    """Tokens that the picture costs."""
    from opsin.engine.model import build

    return build(folder).family.prepare_image(picture(), {}).num_tokens


def timed(run: Run) -> dict[str, float]:
    """First-token times and decode rates from runs of 1 and of 1 + NEW_TOKENS tokens."""
    run(True, 2)  # warm up

    def both(with_image: bool) -> tuple[float, float]:
        first = min(run(with_image, 1) for _ in range(2))
        whole = min(run(with_image, 1 + NEW_TOKENS) for _ in range(2))
        return first, NEW_TOKENS / max(whole - first, 1e-9)

    first, after_image = both(True)
    short_first, short = both(False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {
        "ttft_image_s": first,
        "ttft_text_s": short_first,
        "decode_after_image_tps": after_image,
        "decode_short_tps": short,
        "peak_memory_gb": peak,
    }


def decoder_bytes(folder: Path, dtype_size: int) -> int:
    """Bytes of weights that one decoded token reads: the layers and the head."""
    from opsin.engine.model import build

    decoder = build(folder).decoder
    whole = sum(parameter.numel() for parameter in decoder.parameters())
    table = 0 if decoder.config.tied_head else decoder.embedding.weight.numel()
    return (whole - table) * dtype_size


def child(engine: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", engine, "--model", str(folder)]
    for flag in ("device", "dtype", "quant", "repacked-cache"):
        value = getattr(args, flag.replace("-", "_"))
        if value:
            command += [f"--{flag}", str(value)]
    if args.only_load:
        command.append("--only-load")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", help="a published shape, with random weights")
    parser.add_argument("--model", help="a checkpoint folder or hub name")
    parser.add_argument("--rival", choices=["transformers"])
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--quant", type=int)
    parser.add_argument("--repacked-cache")
    parser.add_argument("--only-load", action="store_true", help="no more than the first token")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--workdir", default=Path(tempfile.gettempdir()) / "opsin-bench")
    parser.add_argument("--child", choices=["opsin", "transformers"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure = {"opsin": measure_opsin, "transformers": measure_transformers}[args.child]
        print(json.dumps(measure(Path(args.model), args)))
        return
    folder = checkpoint_folder(args)
    engines = ["opsin", *([args.rival] if args.rival else [])]
    rounds: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for _ in range(args.rounds):
        for engine in engines:
            rounds[engine].append(child(engine, folder, args))
    report(args.shape or str(args.model), engines, rounds, folder, args)


def report(
    name: str,
    engines: list[str],
    rounds: dict[str, list[dict[str, float]]],
    folder: Path,
    args: argparse.Namespace,
) -> None:
    """Print the medians, our share of the memory bandwidth, and the JSON line."""
    from opsin.cli.doctor import read_bandwidth

    medians = {
        engine: {k: statistics.median(r[k] for r in rounds[engine]) for k in rounds[engine][0]}
        for engine in engines
    }
    line = {"bench": "latency", "model": name, "rounds": len(rounds["opsin"]), **medians}
    for key in medians["opsin"]:
        values = "  ".join(f"{engine} {medians[engine][key]:10.3f}" for engine in engines)
        ratio = ""
        if len(engines) > 1:
            ratio = f"  ratio {medians['opsin'][key] / medians[engines[1]][key]:.2f}"
        print(f"{key:<24}{values}{ratio}")
    if args.only_load or args.quant:
        print(json.dumps(line))
        return
    bandwidth = read_bandwidth() / 1e9
    size = decoder_bytes(folder, 4 if args.dtype == "float32" else 2)
    share = size * medians["opsin"]["decode_short_tps"] / 1e9 / bandwidth
    print(f"memory bandwidth {bandwidth:.1f} GB/s, of which decoding takes {share:.0%}")
    print(json.dumps({**line, "bandwidth_gbps": bandwidth, "bandwidth_share": share}))


if __name__ == "__main__":
    main()
