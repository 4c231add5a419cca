"""Muon for the hidden matrices and AdamW for the rest, under one learning rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal matrices by Newton-Schulz (Jordan 2024), # (count, rows, columns)."""
    states = matrices.bfloat16()
    tall = states.shape[1] > states.shape[2]
    if tall:
        states = states.mT
    states = states / (states.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = states @ states.mT
        states = 3.4445 * states + (-4.7750 * square + 2.0315 * square @ square) @ states
    return states.mT if tall else states


class Optimizer:
    """Steps every parameter; matrices of one shape are handled in one batch."""

    def __init__(self, model: nn.Module, decay: float, muon: bool = True) -> None:
        self.decay = decay
        self.groups: dict[torch.Size, list[nn.Parameter]] = {}
        matrices, tables, vectors = [], [], []
        for name, parameter in model.named_parameters():
            hidden = parameter.ndim == 2 and "embed" not in name and "cell_head" not in name
            if hidden and muon:
                self.groups.setdefault(parameter.shape, []).append(parameter)
                matrices.append(parameter)
            elif parameter.ndim > 1:
                tables.append(parameter)
            else:
                vectors.append(parameter)
        self.momentum = {
            shape: torch.zeros(len(some), *shape, device=some[0].device)
            for shape, some in self.groups.items()
        }
        device = next(model.parameters()).device
        self.adam = torch.optim.AdamW(
            [
                {"params": tables, "weight_decay": decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=1e-3,
            betas=(0.9, 0.95),
            fused=device.type == "cuda",
        )

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step at a learning rate (AdamW's scale)."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        for shape, some in self.groups.items():
            gradient = torch.stack([parameter.grad for parameter in some])
            buffer = self.momentum[shape]
            buffer.lerp_(gradient, 0.05)
            update = orthogonalise(gradient.lerp(buffer, 0.95))
            update = update.float() * (-rate * 0.2 * max(shape) ** 0.5)
            torch._foreach_mul_(some, 1 - rate * self.decay)
            torch._foreach_add_(some, list(update.unbind()))

    def state(self) -> dict[str, object]:
        """Everything needed to go on."""
        return {"adam": self.adam.state_dict(), "momentum": list(self.momentum.values())}

    def restore(self, state: dict[str, object]) -> None:
        """Goes on from state()."""
        self.adam.load_state_dict(state["adam"])
        for buffer, saved in zip(self.momentum.values(), state["momentum"], strict=True):
            buffer.copy_(saved)
