"""Mixture of experts: a router sends each token to a few of many feed-forward blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opsin.decoder.config import GroupedMoEConfig, MoEConfig
from opsin.decoder.mlp import GatedMLP
from opsin.kernels import Kernels
from opsin.nn.experts import ExpertLinear
from opsin.nn.linear import Linear


class Router(nn.Module):
    """Each expert's score for each token, before the softmax; `precise` keeps it in float32."""

    def __init__(
        self, kernels: Kernels, hidden: int, experts: int, *, precise: bool, bias: bool = False
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.precise = precise
        self.weight = nn.Parameter(torch.empty(experts, hidden), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(experts), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) to (tokens, experts), float32."""
        x = x.float() if self.precise else x
        return self.kernels.linear(x, self.weight, self.bias).float()


class MixtureOfExperts(nn.Module):
    """The sum of each token's chosen experts, weighted, and of the shared expert if there is
    one (arXiv:2101.03961, arXiv:2401.06066).
    """

    def __init__(self, kernels: Kernels, config: MoEConfig, hidden: int) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        inner = config.hidden
        self.router = Router(
            kernels,
            hidden,
            config.experts,
            precise=config.precise_router,
            bias=config.router_bias,
        )
        self.gate_up = ExpertLinear(kernels, config.experts, hidden, (inner, inner))
        self.down = ExpertLinear(kernels, config.experts, inner, hidden)
        self.selection_bias: Tensor | None = None
        if config.selection_bias:
            self.selection_bias = nn.Parameter(torch.empty(config.experts), requires_grad=False)
        self.shared = self.shared_gate = None
        if config.shared is not None:
            self.shared = GatedMLP(kernels, config.shared, hidden)
            if config.shared_gate:
                self.shared_gate = Linear(kernels, hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, hidden) to the same shape."""
        mixed = self.routed(x)
        if self.shared is None:
            return mixed
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * torch.sigmoid(self.shared_gate(x))
        return mixed + shared

    def routed(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """What the chosen experts make of x (tokens, hidden), rows grouped by expert.

        The router chooses by `seen`, of x's shape, where it does not choose by x itself.
        """
        config = self.config
        weights, experts = self.route(x if seen is None else seen)
        expert_ids, order = experts.flatten().sort(stable=True)
        rows = x[order // config.top_k]  # (tokens * top_k, hidden)
        if config.weigh_input:
            rows = rows * weights.flatten()[order, None]
        gate_up = self.gate_up(rows, expert_ids)
        if config.up_offset:
            gate_up[:, config.hidden :] += config.up_offset
        inner = self.kernels.gated(gate_up, config.activation)
        out = self.down(inner, expert_ids)
        out = torch.empty_like(out).index_copy_(0, order, out).unflatten(0, weights.shape)
        if config.weigh_input:
            return out.sum(dim=1)
        return (out * weights[..., None]).sum(dim=1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's chosen experts and their weights, both (tokens, top_k)."""
        config = self.config
        logits = self.router(x)
        scores = logits.softmax(dim=-1) if config.router == "softmax" else logits.sigmoid()
        ranked = scores
        if self.selection_bias is not None:
            ranked = scores + self.selection_bias.float()
        if config.limits is not None:
            groups, kept = config.limits
            grouped = ranked.unflatten(-1, (groups, -1))
            worth = grouped.topk(config.limits_by, dim=-1).values.sum(dim=-1)
            chosen = worth.topk(kept, dim=-1).indices
            barred = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, chosen, False)
            ranked = grouped.masked_fill(barred[..., None], 0.0).flatten(1)
        experts = ranked.topk(config.top_k, dim=-1).indices
        weights = scores.gather(1, experts)
        if config.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(config.min_total)
        return (weights * config.scale).to(x.dtype), experts


class GroupedExperts(nn.Module):
    """A mixture of experts for text and another for media, beside what they share."""

    def __init__(self, kernels: Kernels, config: GroupedMoEConfig, hidden: int) -> None:
        super().__init__()
        self.groups = nn.ModuleList(
            MixtureOfExperts(kernels, group, hidden) for group in config.groups
        )
        self.selection_bias = None
        if config.selection_bias:
            shape = (len(config.groups), config.groups[0].experts)
            self.selection_bias = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.shared = None
        if config.shared is not None:
            self.shared = GatedMLP(kernels, config.shared, hidden)
        self.precise = True

    def finish_loading(self) -> None:
        """Let every group see its row of the bias."""
        for i, group in enumerate(self.groups):
            assert isinstance(group, MixtureOfExperts)
            if self.selection_bias is not None:
                group.selection_bias = self.selection_bias.data[i]

    def forward(self, x: Tensor, groups: Tensor | None) -> Tensor:
        """x (tokens, hidden) to the same shape; groups (tokens,) is each token's, None all 0."""
        if groups is None:
            mixed = self.groups[0](x)
        else:
            mixed = torch.empty_like(x)
            for i, group in enumerate(self.groups):
                rows = (groups == i).nonzero()[:, 0]
                mixed[rows] = group(x[rows])
        return mixed if self.shared is None else mixed + self.shared(x)
