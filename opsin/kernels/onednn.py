"""Linear layers in bfloat16 on a CPU, with bias and activation inside oneDNN's product."""

from __future__ import annotations

import torch
from torch import Tensor

from opsin.kernels.interface import Activation, Kernels

# What oneDNN calls each activation, and the variant of it.
NAMES: dict[Activation | None, tuple[str, str]] = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
LEAST_ROWS = 32  # fewer are bound by reading the weights


def is_supported() -> bool:
    """Whether torch has oneDNN here, and this machine the instructions for bfloat16."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class OneDnnKernels(Kernels):
    """Torch, but for the bias, which it copies to every row of the output before the product."""

    name = "torch and oneDNN"

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None = None,
    ) -> Tensor:
        """As the plain one, rounded once, at the end."""
        helps = activation in NAMES and (bias is not None or activation is not None)
        if not helps or x.dtype != torch.bfloat16 or x.numel() < LEAST_ROWS * x.shape[-1]:
            return super().linear(x, weight, bias, activation)
        name, variant = NAMES[activation]
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], variant)
        return out
