"""Gemma 3n: pictures through a convolutional tower, sounds through a conformer, layers over several
streams, and smaller models within the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from opsin.checkpoint.cut import Runs, cut
from opsin.checkpoint.safetensors import StoredTensor
from opsin.checkpoint.weights import Rename
from opsin.decoder.config import DecoderConfig
from opsin.decoder.decoder import Decoder
from opsin.errors import CheckpointError, InputError, MediaError
from opsin.families.base import Encoded, Family, MediaInput, features_of
from opsin.families.gemma3n_names import GEMMA3N_RENAME
from opsin.families.gemma3n_shape import (
    AUDIO,
    VISION,
    audio_shape,
    decoder_shape,
    feeding_layers,
    mel_shape,
    text_shape,
    vision_shape,
)
from opsin.families.slices import Slice, find_slice
from opsin.kernels import Kernels
from opsin.media.sampling import Chooser, Video, uniform_indices
from opsin.towers import pixels
from opsin.towers.mel import too_short
from opsin.towers.mobilenet_v5 import MobileNetV5
from opsin.towers.token_embedder import TokenEmbedder
from opsin.towers.usm import USMEncoder

SLICES = Path(__file__).with_name("data") / "gemma3n_slices.csv"
LONGEST = 30 * 16000
FRAMES = 32
LAYER = r"(language_model\.(?:model\.)?layers\.)"
WIDE = re.compile(r"language_model\.(?:model\.)?layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight$")


class Gemma3n(Family):
    """Every picture and every sound takes as many tokens as every other."""

    modalities = ("image", "video", "audio")
    message_format = "list_with_image_type_text"
    placeholders = {
        "image": "<image_soft_token>",
        "video": "<image_soft_token>",
        "audio": "<audio_soft_token>",
    }
    stand_ins = {"video": "image"}
    rename = GEMMA3N_RENAME
    is_slice = False

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.text = text_shape(config.get("text_config") or {})
        self.vision = {**VISION, **(config.get("vision_config") or {})}
        self.audio = {**AUDIO, **(config.get("audio_config") or {})}
        self.image_tokens = config.get("vision_soft_tokens_per_image") or 256
        self.audio_tokens = config.get("audio_soft_tokens_per_image") or 188
        count = self.text["num_hidden_layers"]
        self.kept: Sequence[int] = range(count)
        own = count - self.text["num_kv_shared_layers"]
        shared = "|".join(map(str, range(own, count))) or "none"
        self.ignored = (rf"{LAYER}({shared})\.self_attn\.([kv]_proj|k_norm)\.",)

    # The decoder.

    def decoder(self) -> DecoderConfig:
        own_rows = self.text["vocab_size"] - self.vision["vocab_offset"]
        if own_rows != self.vision["vocab_size"] + self.audio["vocab_size"]:
            raise CheckpointError(
                "The checkpoint's config.json contradicts itself",
                why="the tokens of pictures and of sounds are not the last of the vocabulary",
                remedy="Use the config.json that the model's authors published",
            )
        tied = bool(self.config.get("tie_word_embeddings", True))
        return decoder_shape(self.text, own_rows, tied=tied)

    def connect(self, decoder: Decoder, towers: nn.ModuleDict) -> None:
        """Tokens of pictures and sounds have tables beside the towers."""
        parts = [_embedder(towers, kind).rows() for kind in ("vision", "audio")]
        decoder.set_own_rows(torch.cat(parts))

    # Smaller models within.

    def take_slice(self, name: str, config: Path | None) -> None:
        chosen = find_slice(config or SLICES, name)
        text = self.text
        kept = chosen.kept(text["num_hidden_layers"])
        self._check_slice(chosen, kept)
        own = text["num_hidden_layers"] - text["num_kv_shared_layers"]
        numbers = {str(old): new for new, old in enumerate(kept)}
        renumber: Rename = (LAYER + r"(\d+)\.", lambda m: f"{m[1]}{numbers.get(m[2], 'skipped')}.")
        self.is_slice, self.kept, self.rename = True, kept, (renumber, *self.rename)
        if chosen.skipped:
            skipped = "|".join(map(str, sorted(chosen.skipped)))
            self.ignored = (*self.ignored, rf"{LAYER}({skipped})\.")
        self.text = {
            **text,
            "num_hidden_layers": len(kept),
            "num_kv_shared_layers": sum(i >= own for i in kept),
            "intermediate_size": list(chosen.widths),
            **{
                each: [text[each][i] for i in kept]
                for each in ("layer_types", "activation_sparsity_pattern")
            },
        }

    def _check_slice(self, chosen: Slice, kept: Sequence[int]) -> None:
        """Refuse a slice without the layers that others need, or wider than the model."""
        needed = chosen.skipped & set(feeding_layers(self.text).values())
        widths = self.text["intermediate_size"]
        wider = [i for i, width in zip(kept, chosen.widths, strict=True) if width > widths[i]]
        if not needed and not wider:
            return
        why = f"layer {min(needed)} is skipped, whose keys and values others read" if needed else ""
        raise InputError(
            f"The slice {chosen.name!r} does not fit this model",
            why=why or f"layer {wider[0]} is only {widths[wider[0]]} wide",
            remedy="Slices are cut from the largest model of the family",
            param="matformer_slice",
        )

    def sliced(self, tensor: StoredTensor) -> StoredTensor:
        if not self.is_slice:
            return tensor
        name, layer = tensor.name, WIDE.search(tensor.name)
        dim = self.text["hidden_size_per_layer_input"]
        groups: Runs = tuple((i * dim, (i + 1) * dim) for i in self.kept)
        if name.endswith("embed_tokens_per_layer.weight"):
            return cut(tensor, columns=groups)
        if name.endswith("per_layer_model_projection.weight"):
            return cut(tensor, rows=groups)
        if layer is None or int(layer[1]) not in self.kept:
            return tensor
        width = self.text["intermediate_size"][self.kept.index(int(layer[1]))]
        down = layer[2] == "down"
        return cut(tensor, columns=((0, width),)) if down else cut(tensor, rows=((0, width),))

    # What goes in.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        del options
        return self._pictures("image", [image])

    def frame_chooser(self, options: Mapping[str, Any]) -> Chooser:
        """Evenly, a second apart unless asked otherwise."""
        rate, most = options.get("fps", 1.0), options.get("max_frames", FRAMES)
        return lambda info: uniform_indices(info, rate, most)

    def prepare_video(self, video: Video, options: Mapping[str, Any]) -> MediaInput:
        """As many pictures."""
        del options
        return self._pictures("video", [Image.fromarray(frame) for frame in video.frames])

    def _pictures(self, kind: str, pictures: Sequence[Image.Image]) -> MediaInput:
        config = self.processor_config
        size = config["size"]["width"], config["size"]["height"]
        normalisation = pixels.normalisation(config)
        resized = [pixels.resize(each, *size, config.get("resample", 2)) for each in pictures]
        soft = self.placeholders["image"] * self.image_tokens
        return MediaInput(
            kind=kind,
            features={"pixel_values": pixels.normalised_tiles(resized, *normalisation)},
            text=f"\n\n<start_of_image>{soft}<end_of_image>\n\n" * len(pictures),
            num_tokens=self.image_tokens * len(pictures),
            size=pictures[0].size,
            processed_size=size,
        )

    def prepare_audio(self, samples: np.ndarray, options: Mapping[str, Any]) -> MediaInput:
        del options
        features, _ = mel_shape(self.processor_config)(
            np.pad(samples, (0, -len(samples) % 128)), len(samples)
        )
        if not len(features):
            raise too_short("33 milliseconds")
        vectors = math.ceil(math.ceil(len(features) / 4) / self.audio["conf_reduction_factor"])
        if len(samples) > LONGEST or vectors > self.audio_tokens:
            raise MediaError(
                f"The sound is too long ({len(samples) / 16000:.1f} seconds)",
                why="this model takes up to 30 seconds",
                remedy="Send it in parts",
                param="audio",
            )
        soft = self.placeholders["audio"] * self.audio_tokens
        text = f"\n\n<start_of_audio>{soft}<end_of_audio>\n\n"
        return MediaInput("audio", {"input_features": features}, text, self.audio_tokens)

    # Towers.

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        width, sight, hearing = self.text["hidden_size"], self.vision, self.audio
        return nn.ModuleDict(
            {
                "vision": MobileNetV5(kernels, vision_shape(sight)),
                "audio": USMEncoder(kernels, audio_shape(hearing)),
                **{
                    f"embed_{kind}": TokenEmbedder(
                        kernels, of["vocab_size"], of["hidden_size"], width, of["rms_norm_eps"]
                    )
                    for kind, of in (("vision", sight), ("audio", hearing))
                },
            }
        )

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        if items[0].kind != "audio":
            features = towers["vision"](features_of(items, "pixel_values"))
            embeds = _embedder(towers, "vision")(features * features.shape[-1] ** 0.5)
            parts = embeds.flatten(0, 1).split([item.num_tokens for item in items])
            return [Encoded(part) for part in parts]
        embedder = _embedder(towers, "audio")
        silence = embedder.rows()[-1:]
        encoded = []
        for item in items:
            heard: Tensor = embedder(towers["audio"](item.features["input_features"]))
            rest = silence.expand(item.num_tokens - len(heard), -1)
            encoded.append(Encoded(torch.cat((heard, rest))))
        return encoded


def _embedder(towers: nn.ModuleDict, kind: str) -> TokenEmbedder:
    embedder = towers[f"embed_{kind}"]
    assert isinstance(embedder, TokenEmbedder)
    return embedder


FAMILY = Gemma3n
