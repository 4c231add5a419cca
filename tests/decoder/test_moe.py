"""Mixtures of experts against one token and one expert at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opsin.decoder.config import GroupedMoEConfig, MLPConfig, MoEConfig
from opsin.decoder.moe import GroupedExperts, MixtureOfExperts
from opsin.kernels import Kernels

HIDDEN = 10
PLAIN = MoEConfig(experts=6, top_k=2, hidden=7)


def filled(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5


def one_by_one(block: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """The same, plainly."""
    config = block.config
    out = torch.zeros_like(x)
    for t, token in enumerate(x):
        logits = block.router.weight @ token
        scores = logits.softmax(0) if config.router == "softmax" else logits.sigmoid()
        ranked = scores if block.selection_bias is None else scores + block.selection_bias
        ranked = ranked.tolist()
        if config.limits is not None:
            groups, kept = config.limits
            size = config.experts // groups
            tops = [
                sorted(ranked[g * size : (g + 1) * size])[-config.limits_by :]
                for g in range(groups)
            ]
            best = sorted(range(groups), key=lambda g: -sum(tops[g]))
            ranked = [v if e // size in best[:kept] else -1.0 for e, v in enumerate(ranked)]
        chosen = sorted(range(config.experts), key=lambda e: -ranked[e])[: config.top_k]
        total = sum(float(scores[e]) for e in chosen) if config.normalise else 1.0
        for e in chosen:
            weight = scores[e] / total * config.scale
            read = token * weight if config.weigh_input else token
            gate, up = (block.gate_up.weight[e] @ read).chunk(2)
            made = block.down.weight[e] @ (torch.nn.functional.silu(gate) * up)
            out[t] += made if config.weigh_input else made * weight
    if block.shared is not None:
        shared = block.shared(x)
        if block.shared_gate is not None:
            shared = shared * block.shared_gate(x).sigmoid()
        out = out + shared
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router": "sigmoid", "normalise": False, "weigh_input": True},
        {"normalise": False, "scale": 2.5, "limits": (3, 1)},
        {"router": "sigmoid", "selection_bias": True, "limits": (2, 1), "limits_by": 2},
        {"selection_bias": True, "precise_router": True, "top_k": 3},
        {"shared": MLPConfig(5), "shared_gate": True},
        {"shared": MLPConfig(5), "top_k": 1},
    ],
    ids=str,
)
def test_grouped_rows_give_what_single_experts_give(changes: dict[str, object]) -> None:
    block = MixtureOfExperts(Kernels(), dataclasses.replace(PLAIN, **changes), HIDDEN)
    filled(block)
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(block(x), one_by_one(block, x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(block(x[:1]), block(x)[:1], atol=1e-5, rtol=1e-4)


def test_each_token_goes_to_the_experts_of_its_group() -> None:
    config = GroupedMoEConfig(
        (PLAIN, dataclasses.replace(PLAIN, hidden=3)), MLPConfig(4), selection_bias=True
    )
    block = GroupedExperts(Kernels(), config, HIDDEN)
    filled(block)
    block.finish_loading()
    x = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(3))
    groups = torch.tensor([0, 1, 1, 0, 0, 1, 0, 1])
    mixed = block(x, groups)
    for i, group in enumerate(groups.tolist()):
        experts = block.groups[group]
        assert isinstance(experts, MixtureOfExperts)
        alone = one_by_one(experts, x[i : i + 1]) + block.shared(x[i : i + 1])
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(block(x, None), block(x, torch.zeros(8, dtype=torch.long)))
