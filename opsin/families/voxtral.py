"""Voxtral (arXiv:2507.13264): Whisper's encoder, four vectors a token, before a Llama decoder.

With `chat_template_kwargs={"transcribe": True}` (and a `language`, if it is known) the bundled
template asks for the words of the sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from opsin.checkpoint.weights import Rename
from opsin.families.backbones import BackboneFamily
from opsin.families.base import Encoded, MediaInput, features_of
from opsin.families.llama_shape import ACTIVATIONS, LLAMA_RENAME
from opsin.kernels import Kernels
from opsin.towers.mel import whisper_features
from opsin.towers.projectors import MLPProjector
from opsin.towers.whisper import WhisperConfig, WhisperEncoder

AUDIO = "[AUDIO]"
TEMPLATE = Path(__file__).with_name("data") / "voxtral.jinja"
# What published configs leave out.
TEXT = {
    "vocab_size": 131072,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 30,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000000.0,
    "head_dim": 128,
}
SOUND = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "scale_embedding": False,
    "activation_function": "gelu",
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}
WHISPER_RENAME: tuple[Rename, ...] = (
    (r"^(model\.)?audio_tower\.", "towers.audio."),
    (r"^towers\.audio\.conv1\.", "towers.audio.first."),
    (r"^towers\.audio\.conv2\.", "towers.audio.second."),
    (r"^towers\.audio\.embed_positions\.", "towers.audio.positions."),
    (r"^towers\.audio\.layer_norm\.", "towers.audio.norm."),
    (r"^(towers\.audio\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.attention_norm."),
    (r"^(towers\.audio\.layers\.\d+)\.final_layer_norm\.", r"\1.mlp_norm."),
    (r"^(towers\.audio\.layers\.\d+)\.self_attn\.out_proj\.", r"\1.attention.out."),
    (r"^(towers\.audio\.layers\.\d+)\.fc1\.", r"\1.mlp.up."),
    (r"^(towers\.audio\.layers\.\d+)\.fc2\.", r"\1.mlp.down."),
)


class Voxtral(BackboneFamily):
    """Sounds in pieces of 30 seconds, each a fixed number of tokens."""

    modalities = ("audio",)
    placeholders = {"audio": AUDIO}
    default_template = TEMPLATE.read_text(encoding="utf-8")
    rename = (
        *WHISPER_RENAME,
        (r"^(model\.)?multi_modal_projector\.linear_1\.", "towers.projector.up."),
        (r"^(model\.)?multi_modal_projector\.linear_2\.", "towers.projector.down."),
        *LLAMA_RENAME,
    )

    @property
    def text_config(self) -> dict[str, Any]:
        return {**TEXT, **(self.config.get("text_config") or {})}

    @property
    def sound(self) -> dict[str, Any]:
        """The encoder's config."""
        return {**SOUND, **(self.config.get("audio_config") or {})}

    @property
    def merge(self) -> int:
        """Vectors of the encoder side by side that make one token."""
        return int(self.sound["intermediate_size"] // self.sound["hidden_size"])

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        sound = self.sound
        encoder = WhisperConfig(
            mels=sound["num_mel_bins"],
            hidden=sound["hidden_size"],
            layers=sound["num_hidden_layers"],
            heads=sound["num_attention_heads"],
            mlp_hidden=sound["intermediate_size"],
            positions=sound["max_source_positions"],
            activation=ACTIVATIONS[sound["activation_function"]],
        )
        width = self.text_config["hidden_size"]
        activation = ACTIVATIONS[self.config.get("projector_hidden_act", "gelu")]
        projector = MLPProjector(
            kernels, sound["intermediate_size"], width, width, activation=activation, bias=False
        )
        return nn.ModuleDict({"audio": WhisperEncoder(kernels, encoder), "projector": projector})

    def prepare_audio(self, samples: np.ndarray, options: Mapping[str, Any]) -> MediaInput:
        del options
        sound, config = self.sound, self.processor_config
        hop = config.get("hop_length", 160)
        frames = 2 * sound["max_source_positions"]
        padded = np.pad(samples, (0, -len(samples) % (frames * hop)))
        features = whisper_features(
            padded, mels=sound["num_mel_bins"], fft=config.get("n_fft", 400), hop=hop
        )
        pieces = features.unflatten(1, (-1, frames)).transpose(0, 1)
        tokens = len(pieces) * sound["max_source_positions"] // self.merge
        return MediaInput("audio", {"input_features": pieces}, AUDIO * tokens, tokens)

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        pieces = features_of(items, "input_features")
        embeds = towers["projector"](towers["audio"](pieces).flatten(0, 1))
        return [Encoded(part) for part in embeds.split([item.num_tokens for item in items])]


FAMILY = Voxtral
