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
from torch import Tensor, nn

from opsin.decoder.config import (
    DecoderConfig,
    LayerInputsConfig,
)
from opsin.errors import CheckpointError, MediaError, UnsupportedMedia
from opsin.families.base import Encoded, Family, MediaInput
from opsin.families.gemma4_names import GEMMA4_RENAME
from opsin.families.gemma4_shape import TEXT, audio_shape, fitted_size, layer_shape, vision_shape
from opsin.kernels import Kernels
from opsin.media.sampling import Chooser, Video, VideoInfo
from opsin.nn.linear import Linear
from opsin.nn.norm import norm
from opsin.towers import pixels
from opsin.towers.axial_vit import AxialTransformer
from opsin.towers.mel import UniversalMel, too_short
from opsin.towers.usm import USMEncoder

TOKENS = {"image_token_id": 258880, "audio_token_id": 258881, "video_token_id": 258884}
LONGEST = 30 * 16000
FRAMES = 768
SOFT_TOKENS = (70, 140, 280, 560, 1120)


class Gemma4(Family):
    """Both kinds of checkpoint: the small ones that hear, the large ones with experts."""

    modalities = ("image", "video", "audio")
    message_format = "list_with_image_type_text"
    placeholders = {"image": "<|image|>", "video": "<|video|>", "audio": "<|audio|>"}
    processor_options = ("max_soft_tokens",)
    rename = GEMMA4_RENAME

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.text = {**TEXT, **(config.get("text_config") or {})}
        self.video = processor_config.get("video_processor") or {}
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
            layers=tuple(
                layer_shape(text, self.kinds, i, self.own_layers) for i in range(len(self.kinds))
            ),
            max_positions=text["max_position_embeddings"],
            norm_eps=text["rms_norm_eps"],
            tied_head=bool(self.config.get("tie_word_embeddings", True)),
            embedding_scale=text["hidden_size"] ** 0.5,
            logit_soft_cap=text.get("final_logit_softcapping"),
            layer_inputs=inputs,
            blank_ids=tuple(self.config.get(name) or value for name, value in TOKENS.items()),
        )

    def atomic_spans(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> list[tuple[int, int]]:
        """Each picture, where the checkpoint lets its tokens see each other."""
        del token_ids
        if self.text.get("use_bidirectional_attention") != "vision":
            return []
        frames = (
            part
            for item in media
            if item.kind != "audio"
            for part in item.indices.chunk(_frames(item))
        )
        return [(int(places[0]), int(places[-1]) + 1) for places in frames]

    # What goes in.

    def cut(self, values: Tensor) -> Tensor:
        """Pictures (..., 3, height, width) as patches (..., patches, patch * patch * 3)."""
        patch = self.processor_config.get("patch_size", 16)
        rows, columns = (side // patch for side in values.shape[-2:])
        grid = values.unflatten(-1, (columns, patch)).unflatten(-3, (rows, patch))
        return grid.movedim(-5, -1).transpose(-4, -3).flatten(-3).flatten(-3, -2)

    def fitted(self, size: tuple[int, int], most: Any) -> tuple[tuple[int, int], int]:
        """The size that a picture of (width, height) is cut at, and its tokens."""
        if most not in SOFT_TOKENS:
            raise MediaError(
                f"max_soft_tokens cannot be {most!r}",
                remedy=f"Use one of {', '.join(map(str, SOFT_TOKENS))}",
                param="processor_kwargs",
            )
        config = self.processor_config
        step = config.get("patch_size", 16) * config.get("pooling_kernel_size", 3)
        width, height = fitted_size(size, step, most)
        return (width, height), width * height // step**2

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        config = self.processor_config
        most = options.get("max_soft_tokens", config.get("max_soft_tokens", 280))
        size, tokens = self.fitted(image.size, most)
        resized = pixels.resize(image, *size, config.get("resample", 3))
        values = pixels.normalised(resized, (0.0,) * 3, (1.0,) * 3)
        return MediaInput(
            kind="image",
            features={"pixel_values": self.cut(values)},
            text=f"<|image>{'<|image|>' * tokens}<image|>",
            num_tokens=tokens,
            size=image.size,
            processed_size=size,
        )

    def frame_chooser(self, options: Mapping[str, Any]) -> Chooser:
        """The first frames of equal parts of the video."""

        def choose(info: VideoInfo) -> list[int]:
            rate = options.get("fps")
            wanted = self.video.get("num_frames", 32) if rate is None else info.duration * rate
            count = max(1, min(int(wanted), options.get("max_frames", FRAMES), info.num_frames))
            return [i * info.num_frames // count for i in range(count)]

        return choose

    def prepare_video(self, video: Video, options: Mapping[str, Any]) -> MediaInput:
        """Small pictures, each after its minute and second."""
        frames = torch.from_numpy(video.frames).permute(0, 3, 1, 2)
        most = options.get("max_soft_tokens", self.video.get("max_soft_tokens", 70))
        size, tokens = self.fitted((frames.shape[3], frames.shape[2]), most)
        values = pixels.normalised_frames(
            pixels.resize_frames(frames, *size), (0.0,) * 3, (1.0,) * 3
        )
        one = f"<|image>{'<|video|>' * tokens}<image|>"
        times = (f"{int(time // 60):02d}:{int(time % 60):02d}" for time in video.timestamps)
        return MediaInput(
            kind="video",
            features={"pixel_values": self.cut(values)},
            text=" ".join(f"{time} {one}" for time in times),
            num_tokens=len(frames) * tokens,
            processed_size=size,
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
            patch = self.processor_config.get("patch_size", 16)
            patches: list[Tensor] = []
            sizes: list[tuple[int, int]] = []
            for item in items:
                width, height = item.processed_size
                frames = item.features["pixel_values"]
                patches += frames if frames.ndim == 3 else [frames]
                sizes += [(height // patch, width // patch)] * (len(patches) - len(sizes))
            parts = towers["vision"](patches, sizes)
        kind = "audio" if items[0].kind == "audio" else "vision"
        embeds = towers[f"embed_{kind}"](towers[f"norm_{kind}"](torch.cat(parts)))
        return [Encoded(part) for part in embeds.split([item.num_tokens for item in items])]


def _frames(item: MediaInput) -> int:
    """How many pictures a picture or a video is."""
    values = item.features["pixel_values"]
    return len(values) if values.ndim == 3 else 1


FAMILY = Gemma4
