"""Rotary position embeddings: frequencies by scaling rule, and the angles of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

RopePairs = Literal["half", "adjacent"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of one kind of layer.

    `dim` is how many features of a head turn (all, or the first part of them). `axes` names, for
    each of the dim / 2 frequencies, the row of the positions it turns by (M-RoPE); empty means row
    0 for all. `scaling` is the checkpoint's rule as sorted pairs, so that configs stay hashable.
    """

    dim: int
    theta: float
    pairs: RopePairs = "half"
    axes: tuple[int, ...] = ()
    scaling: tuple[tuple[str, Any], ...] = ()
    max_positions: int = 0


def scaling_pairs(scaling: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    """A config's `rope_scaling` or `rope_parameters` as `RopeConfig.scaling`."""
    items = (scaling or {}).items()
    return tuple(sorted((k, tuple(v) if isinstance(v, list) else v) for k, v in items))


def contiguous_axes(sections: list[int]) -> tuple[int, ...]:
    """M-RoPE as Qwen2-VL has it: the first sections[0] frequencies turn by time, then height,
    width.
    """
    return tuple(axis for axis, count in enumerate(sections) for _ in range(count))


def interleaved_axes(sections: list[int]) -> tuple[int, ...]:
    """M-RoPE as Qwen3-VL has it: time, height, width in turn until a section is used up, then
    time.
    """
    axes = [0] * sum(sections)
    for axis in (1, 2):
        for i in range(axis, 3 * sections[axis], 3):
            axes[i] = axis
    return tuple(axes)


def inverse_frequencies(
    config: RopeConfig, device: torch.device, *, long: bool = False
) -> tuple[Tensor, float]:
    """The dim / 2 frequencies in radians per position, and the factor on cos and sin.

    `long` is for sequences longer than `long_after` says.
    """
    exponents = (
        torch.arange(0, config.dim, 2, dtype=torch.int64, device=device).float() / config.dim
    )
    frequencies = 1.0 / (config.theta**exponents)
    rule = dict(config.scaling)
    match rule.get("rope_type") or rule.get("type") or "default":
        case "default" | "mrope" | "dynamic":
            return frequencies, 1.0
        case "linear":
            return frequencies / rule["factor"], 1.0
        case "llama3":
            return _llama3(frequencies, rule), 1.0
        case "proportional":
            # Only the first part of the frequencies turns; the other features stand still.
            turning = int(rule.get("partial_rotary_factor", 1.0) * config.dim // 2)
            still = torch.arange(config.dim // 2, device=device) >= turning
            return frequencies.masked_fill(still, 0.0) / rule.get("factor", 1.0), 1.0
        case "yarn":
            return _yarn(frequencies, rule, config)
        case "longrope" | "su":
            return _longrope(frequencies, rule, config, long)
        case kind:
            raise ValueError(f"unknown rope scaling {kind!r}")


def _llama3(frequencies: Tensor, rule: dict[str, Any]) -> Tensor:
    """Llama 3.1's rule: slow frequencies divided by `factor`, fast ones kept, a ramp between."""
    low, high = rule["low_freq_factor"], rule["high_freq_factor"]
    turns = rule["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    ramp = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies / rule["factor"] * (1 - ramp) + frequencies * ramp


def _yarn(frequencies: Tensor, rule: dict[str, Any], config: RopeConfig) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): interpolate the slow frequencies, keep the fast, temper
    attention.
    """
    factor = rule["factor"]
    original = rule.get("original_max_position_embeddings") or config.max_positions

    def boundary(rotations: float) -> float:
        span = math.log(original / (rotations * 2 * math.pi))
        return config.dim * span / (2 * math.log(config.theta))

    low, high = boundary(rule.get("beta_fast") or 32), boundary(rule.get("beta_slow") or 1)
    if rule.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    steps = torch.arange(config.dim // 2, dtype=torch.float32, device=frequencies.device)
    ramp = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    mixed = frequencies / factor * ramp + frequencies * (1 - ramp)
    return mixed, _yarn_attention_factor(rule, factor)


def _yarn_attention_factor(rule: dict[str, Any], factor: float) -> float:
    """The factor on cos and sin: stated, or from mscale, or the paper's 0.1 ln(s) + 1."""
    if rule.get("attention_factor") is not None:
        return float(rule["attention_factor"])

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rule.get("mscale") and rule.get("mscale_all_dim"):
        return mscale(rule["mscale"]) / mscale(rule["mscale_all_dim"])
    return mscale(1.0)


def _longrope(
    frequencies: Tensor, rule: dict[str, Any], config: RopeConfig, long: bool
) -> tuple[Tensor, float]:
    """LongRoPE (arXiv:2402.13753): one divisor a frequency, the long set when the context is
    long.
    """
    original = rule.get("original_max_position_embeddings") or config.max_positions
    factor = config.max_positions / original
    divisors = rule["long_factor"] if long else rule["short_factor"]
    scale = rule.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return frequencies / torch.tensor(divisors, device=frequencies.device), float(scale)


def long_after(config: RopeConfig) -> int | None:
    """The most tokens of a sequence whose angles are the short ones; None if all have the same."""
    rule = dict(config.scaling)
    if (rule.get("rope_type") or rule.get("type")) not in ("longrope", "su"):
        return None
    return int(rule.get("original_max_position_embeddings") or config.max_positions)


class RotaryAngles:
    """Cos and sin of each rope configuration, computed once a step and shared by its layers."""

    def __init__(self, configs: set[RopeConfig], device: torch.device) -> None:
        self.tables = {config: self._table(config, device) for config in configs}
        self.long_tables = {
            config: inverse_frequencies(config, device, long=True)[0]
            for config in configs
            if long_after(config) is not None
        }

    @staticmethod
    def _table(config: RopeConfig, device: torch.device) -> tuple[Tensor, Tensor | None, float]:
        frequencies, factor = inverse_frequencies(config, device)
        axes = torch.tensor(config.axes, device=device) if config.axes else None
        return frequencies, axes, factor

    def at(
        self, positions: Tensor, long: Tensor | None = None
    ) -> dict[RopeConfig, tuple[Tensor, Tensor]]:
        """positions (axes, tokens) to cos and sin, each (tokens, dim / 2), float32.

        long (tokens, 1) says which tokens' sequences have outgrown the short angles; None is none.
        """
        angles = {}
        for config, (frequencies, axes, factor) in self.tables.items():
            rows = positions[0, :, None] if axes is None else positions[axes].T
            if long is not None and config in self.long_tables:
                frequencies = torch.where(long, self.long_tables[config], frequencies)
            angle = rows.float() * frequencies  # (tokens, dim / 2)
            cos, sin = angle.cos(), angle.sin()
            angles[config] = (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)
        return angles
