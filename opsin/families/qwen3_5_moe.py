"""Qwen3.5 with a mixture of experts and a gated shared expert."""

from __future__ import annotations

import dataclasses

from opsin.decoder.config import DecoderConfig, MLPConfig
from opsin.families.llama_shape import EXPERT_RENAME, expert_config, with_experts
from opsin.families.qwen3_5 import Qwen35


class Qwen35MoE(Qwen35):
    """Changes every layer's feed-forward block."""

    rename = (*EXPERT_RENAME, *Qwen35.rename)

    def decoder(self) -> DecoderConfig:
        text, plain = self.text_config, super().decoder()
        moe = expert_config(text)
        shared = MLPConfig(text.get("shared_expert_intermediate_size", 512), moe.activation)
        moe = dataclasses.replace(moe, shared=shared, shared_gate=True)
        return with_experts(plain, moe, range(len(plain.layers)))


FAMILY = Qwen35MoE
