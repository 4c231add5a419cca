"""Qwen3.5: gated delta networks beside gated attention, and no deepstack in the tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from opsin.checkpoint.safetensors import StoredTensor
from opsin.decoder.config import AttentionConfig, DecoderConfig, DeltaNetConfig, LayerConfig
from opsin.families.llama_shape import llama_decoder, rope_parameters
from opsin.families.qwen3_vl import Qwen3VL
from opsin.nn.norm import NormKind
from opsin.nn.rope import interleaved_axes


class Qwen35(Qwen3VL):
    """Changes the decoder: three layers of four keep a state instead of keys and values."""

    rename = (
        (r"\.linear_attn\.in_proj_qkv\.weight$", ".attention.inputs.weight[0]"),
        (r"\.linear_attn\.in_proj_z\.weight$", ".attention.inputs.weight[1]"),
        (r"\.linear_attn\.in_proj_b\.weight$", ".attention.inputs.weight[2]"),
        (r"\.linear_attn\.in_proj_a\.weight$", ".attention.inputs.weight[3]"),
        (r"\.linear_attn\.conv1d\.weight$", ".attention.conv"),
        (r"\.linear_attn\.dt_bias$", ".attention.step_bias"),
        (r"\.linear_attn\.A_log$", ".attention.log_decay"),
        (r"\.linear_attn\.norm\.", ".attention.norm."),
        (r"\.linear_attn\.out_proj\.", ".attention.out."),
        *Qwen3VL.rename,
    )
    ignored = (r"^mtp\.",)
    norm_kind: NormKind = "rms_unit_offset"

    def inspect(self, tensors: Sequence[StoredTensor]) -> None:
        # Checkpoints converted for MLX put the convolution's channels last and store whole norms.
        kernel = self.text_config.get("linear_conv_kernel_dim", 4)
        if any(t.name.endswith("conv1d.weight") and t.shape[1] == kernel for t in tensors):
            self.norm_kind = "rms"

    def decoder(self) -> DecoderConfig:
        text = self.text_config
        rope = {"partial_rotary_factor": 0.25, **rope_parameters(text)}
        sections = rope.get("mrope_section", [11, 11, 10])
        plain = llama_decoder(
            {"intermediate_size": 0, **text, "rope_parameters": rope},
            tied=self.tied(),
            axes=interleaved_axes(sections),
            qk_norm=self.norm_kind,
        )
        layers = tuple(
            self.layer(layer, kind)
            for layer, kind in zip(plain.layers, self.layer_kinds(), strict=True)
        )
        return dataclasses.replace(plain, layers=layers, norm=self.norm_kind)

    def layer_kinds(self) -> list[str]:
        """Each layer's kind in the config's words."""
        text = self.text_config
        every = text.get("full_attention_interval", 4)
        count = text["num_hidden_layers"]
        kinds = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
        return list(text.get("layer_types") or kinds)

    def layer(self, plain: LayerConfig, kind: str) -> LayerConfig:
        """A layer of the named kind."""
        assert isinstance(plain.attention, AttentionConfig)
        if kind == "full_attention":
            gated = dataclasses.replace(plain.attention, output_gate=True)
            return dataclasses.replace(plain, attention=gated)
        text = self.text_config
        delta = DeltaNetConfig(
            key_heads=text.get("linear_num_key_heads", 16),
            value_heads=text.get("linear_num_value_heads", 32),
            key_dim=text.get("linear_key_head_dim", 128),
            value_dim=text.get("linear_value_head_dim", 128),
            conv_kernel=text.get("linear_conv_kernel_dim", 4),
        )
        return dataclasses.replace(plain, attention=delta)


FAMILY = Qwen35
