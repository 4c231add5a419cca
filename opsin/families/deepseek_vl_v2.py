"""DeepSeek-VL2 (arXiv:2412.10302): a padded picture whole and in tiles, a mixture of experts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.decoder.config import DecoderConfig
from opsin.errors import CheckpointError
from opsin.families import bundled_template
from opsin.families.base import Encoded, Family, MediaInput
from opsin.families.clip_shape import clip_config, tile_features
from opsin.families.deepseek_v2_text import LATENT_RENAME, deepseek_decoder
from opsin.families.deepseekocr import padded
from opsin.families.llama_shape import EXPERT_RENAME, LLAMA_RENAME
from opsin.families.llava_next import best_resolution
from opsin.families.multi_modality import TIMM_RENAME, activation_index, tower_shape
from opsin.families.options import switch_option
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.crops import joined
from opsin.towers.projectors import DeepProjector, LearnedVector
from opsin.towers.vit import VisionTransformer, vision_of
from opsin.types import Grounding, Task

MOST_TILED = 2  # pictures in a prompt; where there are more, none is cut into tiles
TAGS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
PROJECTOR = {"projector_type": "downsample_mlp_gelu", "depth": 2, "mlp_ratio": 1}


class DeepseekVLV2(Family):
    """The whole picture and its tiles side by side, each row with its end, a separator between."""

    message_format = "image_token_newline"
    default_template = bundled_template("deepseek_vl2")
    tokenizer_frame = False
    text_apart = True
    processor_options = ("cropping",)
    # The authors' processor adds what a tokenizer lacks of these, in this order.
    answer_tokens = ("<image>", *TAGS, "<|User|>", "<|Assistant|>")
    grounding = (Grounding("ref_det", 999),)
    tasks = {
        "locate": Task("<|ref|>{text}<|/ref|>.", "boxes around what TEXT names"),
        "ground": Task("<|grounding|>{text}", "an answer to TEXT with boxes around what it names"),
    }
    ignored = (r"^vision\.(vision_tower\.)?attn_pool\.",)

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        text = self.text_config
        self.latent: bool = text.get("use_mla", True) and text.get("kv_lora_rank", 0) is not None
        self.rename = (
            (r"^vision\.(vision_tower\.)?", "towers.vision."),
            (r"^projector\.layers\.(\d+)\.", activation_index),
            (r"^image_newline$", "towers.row_end.weight"),
            (r"^view_sep[ae]rator$", "towers.separator.weight"),
            (r"^language\.", ""),
            *TIMM_RENAME,
            *(LATENT_RENAME if self.latent else ()),
            *EXPERT_RENAME,
            *LLAMA_RENAME,
        )
        stated = self.require(config, "vision_config")
        self.vision = {
            **tower_shape(stated),
            "hidden_act": "gelu_pytorch_tanh",
            "image_size": stated.get("image_size", 384),
        }
        self.projector = {**PROJECTOR, **(config.get("projector_config") or {})}
        kind = config.get("tile_tag", "2D"), *(self.projector[key] for key in PROJECTOR)
        if kind[:2] != ("2D", "downsample_mlp_gelu") or kind[3] != 1:
            raise CheckpointError(
                "The checkpoint's pictures are put together in a way that is not known",
                why=f"tile_tag, projector_type, depth and mlp_ratio are {kind}",
                remedy="Use one of the checkpoints that DeepSeek published",
            )
        settings = {**config, **processor_config}
        self.sizes = settings.get("candidate_resolutions") or [(384, 384)]
        self.side: int = self.sizes[0][0]
        self.ratio: int = self.projector.get("downsample_ratio", 2)
        self.across = -(-(self.side // self.vision["patch_size"]) // self.ratio)

    @property
    def text_config(self) -> dict[str, Any]:
        text: dict[str, Any] = self.require(self.config, "language_config")
        return text

    def decoder(self) -> DecoderConfig:
        tied = bool(self.text_config.get("tie_word_embeddings", False))
        return deepseek_decoder(self.text_config, tied=tied, latent=self.latent)

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        tower, hidden = clip_config(self.vision, post_norm=True), self.decoder().hidden
        block = tower.hidden * self.ratio**2
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, tower),
                "projector": DeepProjector(kernels, block, hidden, self.projector["depth"], "gelu"),
                "row_end": LearnedVector(hidden),
                "separator": LearnedVector(hidden),
            }
        )

    def template_serves(self, source: str) -> bool:
        # The small one is published with a template of another of its authors' models.
        return "<|User|>" in source

    # Pictures.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        side, config = self.side, self.processor_config
        size = (side, side)
        if switch_option(options, "cropping", True):
            size = best_resolution(*image.size, [(high, wide) for wide, high in self.sizes])
        mean, std = config.get("image_mean", pixels.HALF), config.get("image_std", pixels.HALF)
        colour = tuple(int(shade * 255) for shade in mean)
        if config.get("normalize", True) is False:
            mean, std = (0.0,) * 3, (1.0,) * 3
        views = [padded(image, target, colour) for target in ((side, side), size)]
        whole, large = (pixels.normalised(view, mean, std) for view in views)
        columns, rows = size[0] // side, size[1] // side
        tiles = large.view(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).flatten(0, 1)
        return self.viewed(torch.cat((whole[None], tiles)), (columns, rows), image.size)

    def viewed(self, views: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> MediaInput:
        """A picture of (width, height) as its views: the whole, then a grid of tiles."""
        columns, rows = grid
        across = self.across
        tokens = across * (across + 1) + 1 + rows * across * (columns * across + 1)
        return MediaInput(
            kind="image",
            features={"pixel_values": views},
            text=self.media_token("image") * tokens,
            num_tokens=tokens,
            size=size,
            processed_size=(columns * self.side, rows * self.side),
            details={"grid": grid},
        )

    def together(self, media: list[MediaInput]) -> list[MediaInput]:
        return media if len(media) <= MOST_TILED else [self.untiled(item) for item in media]

    def untiled(self, item: MediaInput) -> MediaInput:
        """The same picture with one tile, which shows what the whole does."""
        if item.details["grid"] == (1, 1):
            return item
        whole = item.features["pixel_values"][:1]
        alone = self.viewed(torch.cat((whole, whole)), (1, 1), item.size)
        return dataclasses.replace(alone, key=item.key + b" whole", picture=item.picture)

    def text_runs(self, text: str) -> Sequence[str]:
        # An answer is tokenised on its own: its first word does not join the colon before it.
        return re.split(r"(?<=<\|Assistant\|>:)", text)

    # Towers.

    def read(self, towers: nn.ModuleDict, views: Tensor) -> Tensor:
        """Views (views, 3, side, side) to tokens (views, rows, columns, hidden)."""
        patch, ratio = self.vision["patch_size"], self.ratio
        count = self.side // patch
        seen = views[..., : count * patch, : count * patch]
        features = tile_features(vision_of(towers), seen, patch).unflatten(1, (count, count))
        rest = -count % ratio
        blocks = F.pad(features, (0, 0, 0, rest, 0, rest))
        blocks = blocks.unflatten(2, (-1, ratio)).unflatten(1, (-1, ratio))
        # Channel by channel, each one's rows and columns: the order of an unfolded convolution.
        return towers["projector"](blocks.permute(0, 1, 3, 5, 2, 4).flatten(3))

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        views = [item.features["pixel_values"] for item in items]
        # A tile alone shows what the whole does, and need not be read again.
        views = [view[:1] if len(view) == 2 else view for view in views]
        tokens = self.read(towers, torch.cat(views)).split([len(view) for view in views])
        row_end, separator = towers["row_end"], towers["separator"].get_parameter("weight")
        encoded = []
        for item, (whole, *tiles) in zip(items, tokens, strict=True):
            local = joined(torch.stack(tiles or [whole]), item.details["grid"])
            both = [row_end(rows).flatten(0, 1) for rows in (whole, local)]
            if self.config.get("global_view_pos", "head") != "head":
                both.reverse()
            encoded.append(Encoded(torch.cat((both[0], separator[None], both[1]))))
        return encoded


FAMILY = DeepseekVLV2
