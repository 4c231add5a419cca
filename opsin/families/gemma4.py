"""Gemma 4: pictures of any shape, sounds, layers with inputs of their own that share keys and
values, or experts beside each block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from opsin.decoder.config import (
    DecoderConfig,
    EnrichedLayerConfig,
    LayerInputsConfig,
    MLPConfig,
    MoEConfig,
    SharedAttentionConfig,
)
from opsin.errors import CheckpointError, MediaError, UnsupportedMedia
from opsin.families.base import Encoded, Family, MediaInput
from opsin.families.gemma4_names import GEMMA4_RENAME
from opsin.families.gemma4_shape import ROPES, TEXT, audio_shape, fitted_size, vision_shape
from opsin.families.llama_shape import ACTIVATIONS
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import norm
from opsin.nn.rope import RopeConfig, scaling_pairs
from opsin.towers import pixels
from opsin.towers.axial_vit import AxialTransformer
from opsin.towers.mel import UniversalMel, too_short
from opsin.towers.usm import USMEncoder

TOKENS = {"image_token_id": 258880, "audio_token_id": 258881, "video_token_id": 258884}
LONGEST = 30 * 16000
SOFT_TOKENS = (70, 140, 280, 560, 1120)


class Gemma4(Family):
    """Both kinds of checkpoint: the small ones that hear, the large ones with experts."""

    modalities = ("image", "audio")
    message_format = "list_with_image_type_text"
    placeholders = {"image": "<|image|>", "audio": "<|audio|>"}
    processor_options = ("max_soft_tokens",)
    rename = GEMMA4_RENAME

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.text = {**TEXT, **(config.get("text_config") or {})}
        count = self.text["num_hidden_layers"]
        kinds = self.text.get("layer_types") or [
            "full_attention" if i % 6 == 5 else "sliding_attention" for i in range(count)
        ]
        self.kinds = [*kinds[:-1], "full_attention"]
        self.own_layers = count - self.text["num_kv_shared_layers"]
        shared = "|".join(str(i) for i in range(self.own_layers, count)) or "none"
        names = rf"language_model\.(model\.)?layers\.({shared})\.self_attn\.([kv]_proj|k_norm)\."
        self.ignored = (names,)

    # The decoder.

    def decoder(self) -> DecoderConfig:
        text = self.text
        if text.get("use_bidirectional_attention") == "all":
            raise CheckpointError(
                "This checkpoint does not write text",
                why="its config.json lets every token see those that follow it",
                remedy="Choose one for generation",
            )
        inputs = None
        if text["hidden_size_per_layer_input"]:
            inputs = LayerInputsConfig(
                text["vocab_size_per_layer_input"],
                text["hidden_size_per_layer_input"],
            )
        return DecoderConfig(
            vocab_size=text["vocab_size"],
            hidden=text["hidden_size"],
            layers=tuple(self.layer(i) for i in range(text["num_hidden_layers"])),
            max_positions=text["max_position_embeddings"],
            norm_eps=text["rms_norm_eps"],
            tied_head=bool(self.config.get("tie_word_embeddings", True)),
            embedding_scale=text["hidden_size"] ** 0.5,
            logit_soft_cap=text.get("final_logit_softcapping"),
            layer_inputs=inputs,
            blank_ids=tuple(self.config.get(name) or value for name, value in TOKENS.items()),
        )

    def layer(self, index: int) -> EnrichedLayerConfig:
        """One layer; those at the end read the last own keys and values of their kind."""
        text = self.text
        activation = ACTIVATIONS[text["hidden_activation"]]
        shared = index >= self.own_layers
        wide = 2 if shared and text.get("use_double_wide_mlp") else 1
        experts = None
        if text.get("enable_moe_block"):
            experts = MoEConfig(
                experts=text["num_experts"],
                top_k=text["top_k_experts"],
                hidden=text["moe_intermediate_size"],
                activation=activation,
            )
        return EnrichedLayerConfig(
            attention=self.attention(index, shared=shared),
            mlp=MLPConfig(text["intermediate_size"] * wide, activation),
            post_norms=True,
            input_dim=text["hidden_size_per_layer_input"] or 0,
            scaled=True,
            experts=experts,
        )

    def attention(self, index: int, *, shared: bool) -> SharedAttentionConfig:
        """One layer's attention."""
        text, kind = self.text, self.kinds[index]
        full = kind == "full_attention"
        same = full and bool(text.get("attention_k_eq_v"))
        head_dim = text["global_head_dim"] if full else text["head_dim"]
        kv_heads = text["num_key_value_heads"]
        if same:
            kv_heads = text.get("num_global_key_value_heads") or kv_heads
        rope = (text.get("rope_parameters") or ROPES)[kind]
        source = None
        if shared:
            source = max(i for i in range(self.own_layers) if self.kinds[i] == kind)
        stated = (text.get("per_layer_config") or {}).get(str(index)) or {}
        head_dim = stated.get("head_dim", head_dim)
        kv_heads = stated.get("num_key_value_heads", kv_heads)
        bias = bool(text.get("attention_bias", False))
        return SharedAttentionConfig(
            heads=text["num_attention_heads"],
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=RopeConfig(head_dim, float(rope["rope_theta"]), scaling=scaling_pairs(rope)),
            qkv_bias=bias,
            out_bias=bias,
            qk_norm="rms",
            window=None if full else text["sliding_window"],
            scale=1.0,
            shared_from=source,
            values_are_keys=same,
            causal_only=full,
        )

    def atomic_spans(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> list[tuple[int, int]]:
        """Each picture, where the checkpoint lets its tokens see each other."""
        del token_ids
        if self.text.get("use_bidirectional_attention") != "vision":
            return []
        pictures = (item.indices for item in media if item.kind == "image")
        return [(int(places[0]), int(places[-1]) + 1) for places in pictures]

    # What goes in.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        config = self.processor_config
        most = options.get("max_soft_tokens", config.get("max_soft_tokens", 280))
        if most not in SOFT_TOKENS:
            raise MediaError(
                f"max_soft_tokens cannot be {most!r}",
                remedy=f"Use one of {', '.join(map(str, SOFT_TOKENS))}",
                param="processor_kwargs",
            )
        patch, pool = config.get("patch_size", 16), config.get("pooling_kernel_size", 3)
        width, height = fitted_size(image.size, patch * pool, most)
        resized = pixels.resize(image, width, height, config.get("resample", 3))
        values = pixels.normalised(resized, (0.0,) * 3, (1.0,) * 3)
        rows, columns = height // patch, width // patch
        cut = values.view(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0)
        tokens = rows * columns // pool**2
        return MediaInput(
            kind="image",
            features={"pixel_values": cut.flatten(2).flatten(0, 1)},
            text=f"<|image>{'<|image|>' * tokens}<image|>",
            num_tokens=tokens,
            size=image.size,
            processed_size=(width, height),
            details={"grid": (rows, columns)},
        )

    def prepare_audio(self, samples: np.ndarray, options: Mapping[str, Any]) -> MediaInput:
        del options
        if not self.config.get("audio_config"):
            raise UnsupportedMedia(
                "This checkpoint does not take audio",
                why="its config.json has no audio_config",
                remedy="Choose one of the smaller checkpoints of the family",
                param="audio",
            )
        if len(samples) > LONGEST:
            raise MediaError(
                f"The sound is too long ({len(samples) / 16000:.1f} seconds)",
                why="this model takes up to 30 seconds",
                remedy="Send it in parts",
                param="audio",
            )
        padded = np.pad(samples, (0, -len(samples) % 128))
        features, heard = UniversalMel()(padded, len(samples))
        features = features[heard]
        if not len(features):
            raise too_short("20 milliseconds")
        tokens = math.ceil(len(features) / 4)
        text = f"<|audio>{'<|audio|>' * tokens}<audio|>"
        return MediaInput("audio", {"input_features": features}, text, tokens)

    # Towers.

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vision = self.config.get("vision_config") or {}
        width, eps = self.text["hidden_size"], vision.get("rms_norm_eps", 1e-6)
        sight = vision_shape(vision)
        towers: dict[str, nn.Module] = {
            "vision": AxialTransformer(kernels, sight),
            "norm_vision": norm(kernels, "rms_plain", sight.hidden, eps),
            "embed_vision": Linear(kernels, sight.hidden, width),
        }
        audio = self.config.get("audio_config")
        if audio:
            hearing = audio_shape(audio)
            towers["audio"] = USMEncoder(kernels, hearing)
            towers["norm_audio"] = norm(kernels, "rms_plain", hearing.out, hearing.norm_eps)
            towers["embed_audio"] = Linear(kernels, hearing.out, width)
        return nn.ModuleDict(towers)

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        if items[0].kind == "audio":
            parts = [towers["audio"](item.features["input_features"]) for item in items]
        else:
            patches = [item.features["pixel_values"] for item in items]
            parts = towers["vision"](patches, [item.details["grid"] for item in items])
        kind = "audio" if items[0].kind == "audio" else "vision"
        embeds = towers[f"embed_{kind}"](towers[f"norm_{kind}"](torch.cat(parts)))
        return [Encoded(part) for part in embeds.split([len(part) for part in parts])]


FAMILY = Gemma4
