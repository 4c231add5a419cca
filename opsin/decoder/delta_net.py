"""Gated delta networks: attention whose memory is one matrix a head (arXiv:2412.06464)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.decoder.attention import StepContext
from opsin.decoder.config import DeltaNetConfig
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import RMSNorm


class DeltaNet(nn.Module):
    """Projections, a short causal convolution, the gated delta rule, a gated norm, a projection.

    What a sequence has seen is in its state slot: the convolution's last inputs and one matrix
    (key_dim, value_dim) for each value head.
    """

    def __init__(
        self, kernels: Kernels, config: DeltaNetConfig, layer: int, hidden: int, eps: float
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.config = config
        self.layer = layer
        heads, value_dim = config.value_heads, config.value_heads * config.value_dim
        self.inputs = Linear(kernels, hidden, (config.conv_dim, value_dim, heads, heads))
        shape = (config.conv_dim, config.conv_kernel)
        self.conv = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.step_bias = nn.Parameter(torch.empty(heads), requires_grad=False)
        self.log_decay = nn.Parameter(torch.empty(heads), requires_grad=False)
        self.precise = True  # decays near one need more digits than bfloat16 has
        self.norm = RMSNorm(kernels, config.value_dim, eps)
        self.out = Linear(kernels, value_dim, hidden)

    def forward(self, x: Tensor, context: StepContext) -> Tensor:
        """x (tokens, hidden) to the same shape; the sequences' states move on."""
        config, kernels, batch = self.config, self.kernels, context.batch
        conv_state, memory = context.cache.states[self.layer]
        mixed, gate, write, decay = self.inputs(x).split(self.inputs.splits, dim=-1)
        mixed = F.silu(kernels.causal_conv(mixed, self.conv, conv_state, batch))
        query, key, value = mixed.split(config.mixed_dims, dim=-1)
        attended = kernels.gated_delta(
            query.unflatten(-1, (config.key_heads, -1)),
            key.unflatten(-1, (config.key_heads, -1)),
            value.unflatten(-1, (config.value_heads, -1)),
            -self.log_decay.float().exp() * F.softplus(decay.float() + self.step_bias.float()),
            write.float().sigmoid(),
            memory,
            batch,
        )
        attended = self.norm(attended)  # (tokens, value_heads, value_dim)
        gated = attended * F.silu(gate.unflatten(-1, attended.shape[1:]).float())
        return self.out(gated.to(x.dtype).flatten(1))
