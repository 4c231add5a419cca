"""Transformers, on torch or on OpenVINO (optimum-intel), as an engine of bench/cpu.py.

    python bench/transformers_engine.py CHECKPOINT --runtime torch|openvino --bits 16 --picture FILE

Torch computes in bfloat16 whatever the bits are: on a CPU it has no 4-bit form. OpenVINO has its
weights at 4 or 8 bits (8 where 16 are asked, which is what it does by default), exported once.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import cpu_rows as rows
import torch
import transformers
from PIL import Image
from transformers.generation.streamers import BaseStreamer

SIZE = (1024, 768)


class Moments(BaseStreamer):
    """When tokens came; the prompt is not one."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.first = True

    def put(self, value: Any) -> None:
        if not self.first:
            self.times.append(rows.now())
        self.first = False

    def end(self) -> None:
        """Nothing is held back."""


def load(args: argparse.Namespace) -> Any:
    """The model of the runtime."""
    if args.runtime == "torch":
        auto = transformers.AutoModelForImageTextToText
        return auto.from_pretrained(args.folder, dtype=torch.bfloat16)
    from optimum.intel import OVModelForVisualCausalLM, OVWeightQuantizationConfig

    exported = args.folder.with_name(f"{args.folder.name}-openvino-{args.bits}")
    if not exported.exists():
        bits = OVWeightQuantizationConfig(bits=4 if args.bits == 4 else 8)
        model = OVModelForVisualCausalLM.from_pretrained(
            args.folder, export=True, quantization_config=bits, compile=False
        )
        model.save_pretrained(exported)
    threads = {"INFERENCE_NUM_THREADS": str(args.threads)}
    return OVModelForVisualCausalLM.from_pretrained(exported, device="CPU", ov_config=threads)


class Transformers:
    """A model and what the rows ask of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = load(args)
        # The newer of the two has the backends' names, the older one a flag for the faster.
        options = {"use_fast": True} if args.runtime == "openvino" else {"backend": "pil"}
        self.processor = transformers.AutoImageProcessor.from_pretrained(args.folder, **options)
        self.picture = Image.frombytes("RGB", SIZE, args.picture.read_bytes())
        self.image_tokens = args.image_tokens
        self.num_tokens = 0

    def generate(self, ids: list[list[int]], count: int, **more: Any) -> list[float]:
        tokens, moments = torch.tensor(ids), Moments()
        one = {"streamer": moments} if len(ids) == 1 else {}
        with torch.inference_mode():
            self.model.generate(
                input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, **one, **more,
            )  # fmt: skip
        return moments.times

    def row_decode(self) -> rows.Figures:
        return {
            "decode": rows.rate(self.generate([rows.text_ids(rows.SHORT)], 1 + rows.NEW_TOKENS))
        }

    def row_prefill(self) -> rows.Figures:
        start = rows.now()
        times = self.generate([rows.text_ids(rows.PREFILL)], 1)
        return {"prefill": rows.PREFILL / (times[0] - start)}

    def row_streams(self) -> rows.Figures:
        prompts = [rows.text_ids(rows.SHORT, s) for s in range(rows.STREAMS)]
        spent = []
        for count in (1, rows.STREAM_TOKENS):
            start = rows.now()
            self.generate(prompts, count)
            spent.append(rows.since(start))
        return {"streams": rows.STREAMS * (rows.STREAM_TOKENS - 1) / (spent[1] - spent[0])}

    def row_picture(self) -> rows.Figures:
        start = rows.now()
        token = self.model.config.image_token_id
        pixels = self.processor(images=[self.picture], return_tensors="pt")
        more = {k: v for k, v in pixels.items() if k not in ("rows", "cols")}
        ids = [*rows.text_ids(10), *[token] * self.image_tokens, *rows.text_ids(10, 1)]
        if self.model.config.model_type.startswith("qwen"):
            more["mm_token_type_ids"] = (torch.tensor([ids]) == token).int()
        times = self.generate([ids], 1 + rows.AFTER_PICTURE, **more)
        self.num_tokens = len(ids)
        return {"ttft_picture": times[0] - start, "decode_picture": rows.rate(times)}

    def row_tokens(self) -> rows.Figures:
        return {"prompt_tokens": self.num_tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runtime", choices=["torch", "openvino"], default="torch")
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--image-tokens", type=int, required=True)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    start = rows.now()
    with redirect_stdout(sys.stderr):  # an export says much, and here lines are answers
        engine = Transformers(args)
    names = ("decode", "prefill", "streams", "picture", "tokens")
    rows.answer({name: getattr(engine, f"row_{name}") for name in names}, rows.since(start))


if __name__ == "__main__":
    main()
