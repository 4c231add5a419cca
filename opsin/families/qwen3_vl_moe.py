"""Qwen3-VL with a mixture of experts (arXiv:2511.21631)."""

from __future__ import annotations

from opsin.decoder.config import DecoderConfig
from opsin.families.llama_shape import EXPERT_RENAME, expert_config, with_experts
from opsin.families.qwen3_vl import Qwen3VL


class Qwen3VLMoE(Qwen3VL):
    """Changes the decoder: most layers choose a few of many feed-forward blocks for each token."""

    rename = (*EXPERT_RENAME, *Qwen3VL.rename)

    def decoder(self) -> DecoderConfig:
        moe = expert_config(self.text_config)
        return with_experts(super().decoder(), moe, self.sparse_layers())

    def sparse_layers(self) -> set[int]:
        """The layers that have experts."""
        text = self.text_config
        step = text.get("decoder_sparse_step", 1)
        dense = text.get("mlp_only_layers") or ()
        count = text["num_hidden_layers"]
        return {i for i in range(count) if i not in dense and (i + 1) % step == 0}


FAMILY = Qwen3VLMoE
