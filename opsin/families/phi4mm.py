"""Phi-4-multimodal (arXiv:2503.01743): crops and speech before one decoder, with an adapter for
each.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.decoder.config import DecoderConfig
from opsin.errors import MediaError
from opsin.families.base import Encoded, Family, MediaInput
from opsin.families.clip_shape import clip_config, layer_counts, one_side
from opsin.families.llama_shape import ACTIVATIONS, llama_decoder
from opsin.families.options import MAX_TILES, whole_option
from opsin.families.phi4mm_adapters import ADAPTER_FOLDERS, beside
from opsin.families.phi4mm_names import ADAPTERS, IMAGE, NESTED, PHI4MM_RENAME, SPEECH_NAMES
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.conformer import Conformer, ConformerConfig
from opsin.towers.crops import crop_grid, crop_masks, crops_and_whole, fitted, joined
from opsin.towers.mel import speech_features, too_short
from opsin.towers.projectors import LearnedVector, MLPProjector
from opsin.towers.vit import VisionLayout, VisionTransformer, bucketed_positions, vision_of

IMAGE_ID, AUDIO_ID = 200010, 200011
VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "feature_layer": -2,
}


class Phi4Multimodal(Family):
    """The published layout and the one that Transformers saves, whose adapters lie beside it."""

    modalities = ("image", "audio")
    message_format = "numbered_image_tokens"
    placeholders = {"image": "<|image_1|>", "audio": "<|audio_1|>"}
    processor_options = ("dynamic_hd",)
    rename = PHI4MM_RENAME
    adapter_folders = ADAPTER_FOLDERS

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__({**config, **beside(config)}, processor_config)
        self.adapters_beside = bool(beside(config))
        published = config.get("embd_layer") or {}
        image = published.get("image_embd_layer") or {}
        self.vision = {**VISION_DEFAULTS, **image, **(config.get("vision_config") or {})}
        settings = (config.get("audio_processor") or {}).get("config") or {}
        for name in NESTED:
            settings = {**settings, **(settings.get(name) or {})}
        named = {SPEECH_NAMES.get(name, name): value for name, value in settings.items()}
        self.speech = {**named, **(config.get("audio_config") or {})}
        layers = self.vision["num_hidden_layers"]
        self.count = layer_counts(self.vision["feature_layer"], layers)[0]
        self.names = {"image": "<|endoftext10|>", "audio": "<|endoftext11|>"}
        later = "|".join(str(index) for index in range(self.count, layers)) or "none"
        unused = rf"(head\.|post_layernorm\.|encoder\.layers\.({later})\.)"
        self.ignored = (IMAGE + r"img_processor\." + unused,)

    # The model.

    def decoder(self) -> DecoderConfig:
        text = dict(self.config)
        rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
        if text.get("original_max_position_embeddings"):
            rope.setdefault(
                "original_max_position_embeddings", text["original_max_position_embeddings"]
            )
        rope.setdefault("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
        text.update(rope_parameters=rope, rope_scaling=None)
        text.setdefault("rms_norm_eps", 1e-5)
        if (text.get("sliding_window") or 0) >= text["max_position_embeddings"]:
            text["sliding_window"] = None
        tied = bool(text.get("tie_word_embeddings", False))
        loras = (text.get("vision_lora"), text.get("speech_lora"))
        adapters = tuple((lora["r"], lora["lora_alpha"] / lora["r"]) for lora in loras if lora)
        return dataclasses.replace(llama_decoder(text, tied=tied), adapters=adapters)

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit = clip_config(self.vision, layers=self.count)
        speech, width = self.speech, self.config["hidden_size"]
        heard = ConformerConfig(
            mels=speech.get("input_size", 80),
            hidden=speech.get("hidden_size", 1024),
            layers=speech.get("num_blocks", 24),
            heads=speech.get("num_attention_heads", 16),
            mlp_hidden=speech.get("intermediate_size", 1536),
            channels=speech.get("nemo_conv_channels", 1024),
            conv_hidden=speech.get("ext_pw_out_channel", 1024),
            depth_hidden=speech.get("depthwise_separable_out_channel", 1024),
            kernel=speech.get("kernel_size", 3),
            reduction=speech.get("time_reduction", 8),
            max_distance=speech.get("bias_max_distance", 1000),
            symmetric=bool(speech.get("bias_symmetric", False)),
            activation=ACTIVATIONS[speech.get("activation", "swish")],
            conv_activation=ACTIVATIONS[speech.get("conv_activation", "swish")],
            gate_activation=ACTIVATIONS[speech.get("conv_glu_type", "swish")],
        )
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "row_end": LearnedVector(vit.hidden),
                "between": LearnedVector(vit.hidden),
                "image": MLPProjector(kernels, vit.hidden, width, width),
                "audio": Conformer(kernels, heard),
                "speech": MLPProjector(kernels, heard.hidden, width, width),
                "sight": MLPProjector(kernels, heard.hidden, width, width),
            }
        )

    # What goes in.

    def name_tokens(self, name_of: Callable[[int], str | None]) -> None:
        ids = {
            "image": self.vision.get("image_token_id", IMAGE_ID),
            "audio": self.speech.get("audio_token_id", AUDIO_ID),
        }
        for kind, token_id in ids.items():
            self.names[kind] = name_of(token_id) or self.names[kind]

    def media_token(self, kind: str) -> str:
        return self.names[kind]

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """Placeholders are numbered; a sound beside a picture has a projector of its own."""
        for kind in self.modalities:
            text = re.sub(rf"<\|{kind}_\d+\|>", self.placeholders[kind], text)
            text = text.replace(self.names[kind], self.placeholders[kind])
        if any(item.kind == "image" for item in media):
            for item in media:
                if item.kind == "audio" and "sight" not in item.details:
                    item.details["sight"] = True
                    item.key += b"sight" if item.key else b""
        return super().expand(text, media)

    def adapter(self, media: Sequence[MediaInput]) -> int | None:
        if not self.decoder().adapters or not media:
            return None
        return ADAPTERS["vision" if any(item.kind == "image" for item in media) else "speech"]

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        config = self.processor_config
        side = one_side(self.vision.get("crop_size", 448))
        patch = one_side(self.vision["patch_size"])
        most = whole_option(options, "dynamic_hd", config.get("dynamic_hd", 36), high=MAX_TILES)
        grid = crop_grid(image.size, side, most)
        filled = fitted(image.size, (grid[0] * side, grid[1] * side))
        if min(filled) < 10:
            raise MediaError(
                f"The picture is too narrow ({image.width}x{image.height})",
                why="cut to this model's crops it would be under 10 pixels wide",
                remedy="Crop it or pad it",
                param="image",
            )
        half = pixels.HALF
        shades = config.get("image_mean", half), config.get("image_std", half)
        crops = crops_and_whole(image, grid, side, filled, shades)
        seen = [grid[i] * side // patch - (grid[i] * side - filled[i]) // patch for i in (0, 1)]
        columns, rows = (-(-count // 2) for count in seen)
        base = side // patch // 2
        tokens = base * (base + 1) + 1 + rows * (columns + 1)
        return MediaInput(
            kind="image",
            features={"image_pixel_values": crops, "seen": torch.tensor(seen)},
            text=self.names["image"] * tokens,
            num_tokens=tokens,
            size=image.size,
            processed_size=(grid[0] * side, grid[1] * side),
            details={"grid": grid},
        )

    def prepare_audio(self, samples: np.ndarray, options: Mapping[str, Any]) -> MediaInput:
        del options
        if len(samples) < 400:
            raise too_short("25 milliseconds")
        features = speech_features(samples, mels=self.speech.get("input_size", 80))
        tokens = -(-len(features) // self.speech.get("time_reduction", 8))
        return MediaInput(
            "audio", {"audio_input_features": features}, self.names["audio"] * tokens, tokens
        )

    # Towers.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        if items[0].kind == "image":
            return [Encoded(towers["image"](self.picture(towers, item))) for item in items]
        encoded = []
        for item in items:
            heard = towers["audio"](item.features["audio_input_features"])
            projector = towers["sight" if item.details.get("sight") else "speech"]
            encoded.append(Encoded(projector(heard)))
        return encoded

    def picture(self, towers: nn.ModuleDict, item: MediaInput) -> Tensor:
        """A picture's features: its crops put together, then the whole, each row with its end."""
        tower = vision_of(towers)
        weight = tower.patch.weight
        crops, grid = item.features["image_pixel_values"], item.details["grid"]
        columns, rows = item.features["seen"].tolist()
        patch = one_side(self.vision["patch_size"])
        side = crops.shape[-1] // patch
        masks = crop_masks(grid, side, columns, rows)  # (crops, side, side)
        places = torch.stack([_places(mask) for mask in masks]).flatten()
        bias = torch.zeros(masks.shape).masked_fill(~masks, torch.finfo(weight.dtype).min)
        layout = VisionLayout(
            [side**2] * len(crops),
            position_embeds=tower.positions(places.to(weight.device)),
            bias=bias.flatten(1)[:, None, None].to(weight),
        )
        cut = pixels.patchify(crops.to(weight), patch)
        _, (features,) = tower(cut, layout, taps=(self.count - 1,))
        cells = features.unflatten(0, (len(crops), side, side)).permute(0, 3, 1, 2)
        cells = F.avg_pool2d(cells, 2).permute(0, 2, 3, 1)  # (crops, side / 2, side / 2, width)
        detail = joined(cells[1:], grid)[: -(-rows // 2), : -(-columns // 2)]
        detail, whole = (towers["row_end"](part).flatten(0, 1) for part in (detail, cells[0]))
        return torch.cat((detail, towers["between"].get_parameter("weight")[None], whole))


def _places(mask: Tensor) -> Tensor:
    """Rows of the position table for a crop: spread over the patches that are seen, else 0."""
    side = len(mask)
    rows, columns = int(mask[:, 0].sum()), int(mask[0].sum())
    places = torch.zeros(mask.shape, dtype=torch.long)
    places[:rows, :columns] = bucketed_positions(rows, columns, side).view(rows, columns)
    return places


FAMILY = Phi4Multimodal
