"""PaliGemma 1 and 2 (arXiv:2407.07726, arXiv:2412.03555): picture and prompt are seen in both
directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from opsin.decoder.config import DecoderConfig
from opsin.errors import InputError
from opsin.families.backbones import BackboneFamily
from opsin.families.base import Encoded, MediaInput, features_of
from opsin.families.clip_shape import (
    CLIP_IGNORED,
    CLIP_RENAME,
    clip_config,
    one_side,
    tile_features,
    with_defaults,
)
from opsin.families.gemma_shape import GEMMA_RENAME, gemma_decoder
from opsin.families.llama_shape import LLAMA_RENAME
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.towers import pixels
from opsin.towers.vit import VisionTransformer, vision_of
from opsin.types import Grounding, Task

IMAGE = "<image>"


class PaliGemma(BackboneFamily):
    """A task in words after the picture, answered by a prefix language model."""

    message_format = "prompt_with_image_token"
    bare_prompt = True
    tokenizer_frame = False
    tied_default = True
    grounding = (Grounding("loc_tokens", 1024),)
    tasks = {
        "describe": Task("caption en", "a caption"),
        "ocr": Task("ocr", "the text of a picture"),
        "locate": Task("detect {text}", "boxes around what you name"),
        "segment": Task("segment {text}", "masks of what you name"),
    }
    ignored = CLIP_IGNORED

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vision = with_defaults(config.get("vision_config") or {}, "siglip_vision_model")
        self.patch = one_side(self.vision["patch_size"])
        first = self.text_config.get("model_type", "gemma") == "gemma"
        self.rename = (
            *CLIP_RENAME,
            (r"^(model\.)?multi_modal_projector\.linear\.", "towers.projector."),
            *(LLAMA_RENAME if first else GEMMA_RENAME),
        )

    def decoder(self) -> DecoderConfig:
        text = {"model_type": "gemma", **self.text_config}
        decoder = gemma_decoder(text, tied=self.tied())
        windows = [attention.window for attention in decoder.attentions]
        return dataclasses.replace(decoder, spans_pass_windows=any(windows))

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit = clip_config(self.vision, post_norm=True)
        projector = Linear(kernels, vit.hidden, self.decoder().hidden, bias=True)
        return nn.ModuleDict({"vision": VisionTransformer(kernels, vit), "projector": projector})

    # What goes in.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        del options
        framed = pixels.framed(image, self.processor_config)
        values = pixels.normalised(framed, *pixels.normalisation(self.processor_config))
        tokens = (framed.width // self.patch) * (framed.height // self.patch)
        return MediaInput(
            kind="image",
            features={"pixel_values": values[None]},
            text=IMAGE * tokens,
            num_tokens=tokens,
            size=image.size,
            processed_size=framed.size,
        )

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """All pictures come first, then the beginning-of-sequence token and the words.

        Raises InputError for a prompt without a picture, which the model was never taught.
        """
        if not media:
            raise InputError(
                "This model answers about a picture, and none came",
                remedy="Send one",
                param="image",
            )
        pictures = super().expand(IMAGE * text.count(IMAGE), media)
        return f"{pictures}<bos>{text.replace(IMAGE, '')}\n"

    def positions(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> tuple[Tensor, int]:
        """Positions count from one."""
        positions, following = super().positions(token_ids, media)
        return positions + 1, following + 1

    def atomic_spans(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> list[tuple[int, int]]:
        """The whole prompt."""
        del media
        return [(0, len(token_ids))]

    # Towers.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        tiles = features_of(items, "pixel_values")
        features = tile_features(vision_of(towers), tiles, self.patch)
        return [Encoded(embeds) for embeds in towers["projector"](features)]


FAMILY = PaliGemma
