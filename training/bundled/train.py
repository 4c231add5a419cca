"""Trains the bundled model in resumable pieces of wall-clock time on one GPU."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from training.bundled import checkpoint
from training.bundled.feed import Feed, join
from training.bundled.forward import Packed
from training.bundled.optimizer import Optimizer
from training.bundled.packing import Factory

FRESH = {"elapsed": 0.0, "step": 0, "samples": 0, "piece": 0}


def rate_at(progress: float, peak: float) -> float:
    """Warm-up over 1.5 %, a plateau, then a cosine to zero over the last 60 %."""
    if progress < 0.015:
        return peak * progress / 0.015
    if progress < 0.4:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.4) / 0.6)))


def _save(
    args: argparse.Namespace, packed: Packed, optimizer: Optimizer, facts: dict[str, Any]
) -> None:
    state = {"model": packed.state_dict(), "optimizer": optimizer.state(), "facts": facts}
    torch.save(state, args.state)
    if args.out is None:
        return
    tokenizer = checkpoint.build_tokenizer()
    folder = Path(args.state).parent / "export"
    checkpoint.save_folder(folder, packed.model, tokenizer)
    target = Path(args.out)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "model.safetensors", target / "model.safetensors")
    # What bfloat16 rounds away, so that training can go on elsewhere from these two files.
    rest = {
        name: (tensor - tensor.bfloat16().float()).bfloat16().cpu().contiguous()
        for name, tensor in packed.model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(rest, target / "rest.safetensors")
    head = {name: tensor.bfloat16().cpu() for name, tensor in packed.cell_head.state_dict().items()}
    save_file(head, target / "cell_head.safetensors")
    (target / "facts.json").write_text(json.dumps(facts) + "\n")


def _restore_weights(folder: Path, packed: Packed) -> dict[str, Any]:
    """An --out folder, or a checkpoint folder that has the weights alone."""
    weights = {
        name: value.float() for name, value in load_file(folder / "model.safetensors").items()
    }
    if (folder / "rest.safetensors").exists():
        for name, value in load_file(folder / "rest.safetensors").items():
            weights[name] += value.float()
    packed.model.load_state_dict(weights, strict=False)
    if (folder / "cell_head.safetensors").exists():
        packed.cell_head.load_state_dict(load_file(folder / "cell_head.safetensors"))
    if (folder / "facts.json").exists():
        return json.loads((folder / "facts.json").read_text())
    return dict(FRESH)


def _restore(args: argparse.Namespace, packed: Packed, optimizer: Optimizer) -> dict[str, Any]:
    if Path(args.state).exists():
        state = torch.load(args.state, weights_only=True, map_location=args.device)
        packed.load_state_dict(state["model"])
        optimizer.restore(state["optimizer"])
        return state["facts"]
    if args.resume_from is not None:
        return _restore_weights(Path(args.resume_from), packed)
    return dict(FRESH)


def _report(window: list[Tensor], facts: dict[str, Any], rate: float, fresh: int) -> None:
    loss, cell, right = torch.stack(window).mean(0).tolist()
    speed = facts["samples"] / max(1.0, facts["elapsed"])
    print(
        f"step {facts['step']} time {facts['elapsed']:.0f}s loss {loss:.4f} cell {cell:.4f} "
        f"right {right:.4f} rate {rate:.2e} {speed:.0f} samples/s {fresh} packs fresh",
        flush=True,
    )


def train(args: argparse.Namespace) -> Qwen3VLForConditionalGeneration:
    """One piece: goes on from the state file, for args.seconds, and saves."""
    begun = time.monotonic()
    device = torch.device(args.device)
    tokenizer = checkpoint.build_tokenizer()
    seed = args.seed
    if Path(args.state).exists():
        seed += 1000 * (1 + int(Path(args.state).stat().st_mtime) % 100_000)
    factory = Factory(tokenizer, args.workers, args.pack, seed, args.slots)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    packed = Packed(checkpoint.build_model(tokenizer)).to(device)
    optimizer = Optimizer(packed, args.decay, muon=not args.no_muon)
    facts = _restore(args, packed, optimizer)
    if args.compile:
        packed.compile_layers()
    feed = Feed(factory, device, args.replays)
    print(f"ready after {time.monotonic() - begun:.1f} s", flush=True)
    start, base = time.monotonic(), facts["elapsed"]
    window: list[Tensor] = []
    while time.monotonic() - begun < args.seconds:
        batch = join(feed.take(args.packs))
        if args.anneal:
            rate = args.rate * max(0.0, 1 - (time.monotonic() - begun) / args.seconds)
        else:
            rate = rate_at(facts["elapsed"] / args.total_seconds, args.rate)
        with torch.autocast(device.type, torch.bfloat16):
            loss, cell, right = packed.losses(batch)
        share = max(0.05, args.cell_weight * (1 - facts["elapsed"] / (0.7 * args.total_seconds)))
        (loss + share * cell).backward()
        torch.nn.utils.clip_grad_norm_(packed.parameters(), 1.0)
        optimizer.step(rate)
        packed.zero_grad(set_to_none=True)
        window.append(torch.stack((loss.detach(), cell.detach(), right)))
        facts["step"] += 1
        facts["samples"] += args.packs * args.pack
        facts["elapsed"] = base + time.monotonic() - start
        if facts["step"] % args.log_every == 0 or facts["step"] <= 3:
            _report(window, facts, rate, feed.fresh)
            window.clear()
    feed.close()
    facts["piece"] += 1
    _save(args, packed, optimizer, facts)
    print(json.dumps(facts), flush=True)
    return packed.model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=540, help="wall clock of this piece")
    parser.add_argument("--total-seconds", type=float, default=1600, help="the schedule's length")
    parser.add_argument("--state", default="/tmp/bundled/state.pt")
    parser.add_argument("--out", help="folder for the exported weights")
    parser.add_argument("--resume-from", help="an --out folder, where there is no state file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--pack", type=int, default=32, help="samples a worker packs together")
    parser.add_argument("--packs", type=int, default=8, help="packs in a step")
    parser.add_argument("--slots", type=int, default=48)
    parser.add_argument("--replays", type=int, default=2, help="times a pack may be used again")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--cell-weight", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--no-muon", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--anneal", action="store_true", help="fall from --rate to zero over this piece alone"
    )
    args = parser.parse_args()
    Path(args.state).parent.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
