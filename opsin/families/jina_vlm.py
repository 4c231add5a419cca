"""jina-vlm (arXiv:2512.04032): Molmo's crops, seen by SigLIP 2 and read by Qwen 3's blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.checkpoint.safetensors import StoredTensor
from opsin.decoder.config import DecoderConfig
from opsin.errors import CheckpointError
from opsin.families.base import Encoded, Family, MediaInput
from opsin.families.jina_vlm_shape import (
    GATED,
    RENAME,
    TEXT_BIAS,
    TOWER,
    decoder_of,
    inner_width,
    tower_of,
    unlike,
)
from opsin.families.llama_shape import ACTIVATIONS
from opsin.families.molmo_shape import (
    crop_patches,
    grid_of,
    halves,
    layers_named,
    picture_features,
    rows_of,
    tensor_of,
)
from opsin.families.options import MAX_TILES, pixel_limits, switch_option, whole_option
from opsin.families.patch_grids import smart_resize
from opsin.kernels import Kernels
from opsin.nn.linear import Embedding
from opsin.towers import pixels
from opsin.towers.projectors import GatedProjector
from opsin.towers.vit import VisionLayout, VisionTransformer, vision_of
from opsin.towers.window_pooling import WindowPooling

IMAGE, PATCH = "<|image|>", "<im_patch>"
START, END, COLUMN = "<im_start>", "<im_end>", "<im_col>"
BEGIN = "<|endoftext|>"  # where the config names no beginning
PIXELS = (56 * 56, 28 * 28 * 1280)
# Of torch's ways to resize, those that can smooth.
SMOOTHED = ("bilinear", "bicubic")
RESIZES = (*SMOOTHED, "nearest", "nearest-exact")


class JinaVLM(Family):
    """Any number of pictures; each is seen whole and in crops, whose features are added."""

    message_format = "image_token_pipe"
    placeholders = {"image": IMAGE}
    media_tokens = {"image": PATCH}
    tokenizer_frame = False
    processor_options = ("max_crops", "min_pixels", "max_pixels", "do_resize")
    rename = RENAME
    begin = BEGIN

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vision = config["vision_config"]
        self.connector = self.vision["vl_connector_config"]
        self.side, self.patch = self.vision["input_size"][0], self.vision["patch_size"]
        self.margins = tuple(processor_config.get("overlap_margins", (4, 4)))
        self.mode = processor_config.get("interpolation", "bicubic")
        self.scale = processor_config.get("normalization_method", "gaussian")
        self.biased = False
        wrong = list(unlike(self.text_config, self.vision, processor_config))
        wrong += ["overlap_margins"] * any(margin % 2 for margin in self.margins)
        wrong += ["interpolation"] * (self.mode not in RESIZES)
        wrong += ["normalization_method"] * (self.scale not in ("gaussian", "minmax"))
        if wrong:
            raise CheckpointError(
                "The checkpoint has parts that Opsin does not build",
                why=f"its configs differ in {', '.join(wrong)}",
                remedy="Use the checkpoint that the model's authors published",
            )
        # What is behind the post norm counts as one layer more.
        count = self.vision["n_layers"]
        self.taps = layers_named(self.vision["vit_layers"], count + 1)
        self.layers = min(max(self.taps) + 1, count)
        unused = "|".join(map(str, range(self.layers, count))) or "none"
        self.ignored = (rf"{TOWER}layers\.({unused})\.",)
        if count not in self.taps:
            self.ignored += (TOWER + r"post_l?norm\.",)
        self.template_variables = {
            "always_start_with_space": bool(processor_config.get("always_start_with_space")),
            "image_prompt_token": IMAGE,
        }

    def inspect(self, tensors: Sequence[StoredTensor]) -> None:
        """Biases of queries, keys and values may be stored whatever the config says."""
        self.biased = any(re.search(TEXT_BIAS, tensor.name) for tensor in tensors)

    def apart(self, tensor: StoredTensor) -> Sequence[StoredTensor]:
        return halves(tensor, GATED)

    def name_tokens(self, name_of: Callable[[int], str | None]) -> None:
        """The beginning is the token that the config numbers."""
        number = self.config.get("bos_token_id")
        self.begin = (None if number is None else name_of(number)) or BEGIN

    def decoder(self) -> DecoderConfig:
        tied = bool(self.config.get("tie_word_embeddings", False))
        return decoder_of(self.text_config, tied=tied, biased=self.biased)

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vision, feed = self.vision, self.connector["mlp_projector_config"]
        wide, both = vision["hidden_size"], vision["hidden_size"] * len(self.taps)
        normed = vision["n_layers"] in self.taps and bool(vision.get("post_lnorm"))
        heads, out = self.connector["attn_pooling_config"]["n_heads"], vision["output_size"]
        kind = ACTIVATIONS[feed["activation_type"]]
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(
                    kernels, tower_of(vision, self.layers, post_norm=normed)
                ),
                "padding": Embedding(2, both),
                "pooling": WindowPooling(kernels, both, wide, heads, out=True),
                "projector": GatedProjector(kernels, wide, inner_width(feed, wide), out, kind),
            }
        )

    # What goes in.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        """The whole picture, and larger in crops, both without keeping its proportions."""
        config, side, patch = self.processor_config, self.side, self.patch
        most = whole_option(options, "max_crops", config.get("max_crops", 6), high=MAX_TILES)
        picture = tensor_of(image).to(torch.uint8)
        if switch_option(options, "do_resize", config.get("do_resize", True)):
            size = smart_resize(*image.size, patch, pixel_limits(options, config, PIXELS))
            picture = self._sized(picture, size[::-1])
        border = sum(self.margins) * patch
        step = side - border
        grid = grid_of(picture.shape[1] - border, picture.shape[2] - border, step, most)
        shape = grid[0] * step + border, grid[1] * step + border
        whole, large = (self._normalised(picture, size) for size in ((side, side), shape))
        crops = torch.cat(
            (
                crop_patches(whole, (1, 1), side, side, patch),
                crop_patches(large, grid, side, step, patch),
            )
        )
        half = (side // patch + 1) // 2
        down, across = (count * half - (count - 1) * (sum(self.margins) // 2) for count in grid)
        end = COLUMN if config.get("use_column_tokens", True) else ""
        grids = (rows_of(PATCH, half, half, end), rows_of(PATCH, across, down, end))
        return MediaInput(
            kind="image",
            features={"pixel_values": crops, "shown": (crops != -1).flatten(1).any(1)},
            text="".join(f"{START}{text}{END}" for text in grids),
            num_tokens=half**2 + down * across,
            size=image.size,
            processed_size=shape[::-1],
            details={"grid": grid},
        )

    def _sized(self, picture: Tensor, shape: tuple[int, int]) -> Tensor:
        """A picture (3, h, w) of levels, or of values from 0 to 1, as values at another size.

        Levels become levels again on the way, unless the config asks for more precision.
        """
        levels = picture.dtype == torch.uint8
        rounded = levels and not self.processor_config.get("resize_in_float32", True)
        values = picture.float()
        if levels and not rounded:
            values = values / 255
        if values.shape[1:] != shape:
            smooths = self.mode in SMOOTHED
            values = F.interpolate(
                values[None],
                shape,
                mode=self.mode,
                align_corners=False if smooths else None,
                antialias=smooths and self.processor_config.get("antialias", True),
            )[0]
        if rounded:
            values = values.round() / 255
        return values.clamp(0, 1)

    def _normalised(self, picture: Tensor, shape: tuple[int, int]) -> Tensor:
        """A picture at another size, its values around 0."""
        config, values = self.processor_config, self._sized(picture, shape)
        if self.scale == "minmax":
            low, high = config.get("image_min") or -1.0, config.get("image_max") or 1.0
            return low + values * (high - low)
        mean, std = (
            torch.tensor(config.get(name) or usual).view(-1, 1, 1)
            for name, usual in (("image_mean", pixels.CLIP_MEAN), ("image_std", pixels.CLIP_STD))
        )
        return (values - mean) / std

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """Every prompt begins with a token of its own."""
        text = super().expand(text, media)
        return text if text.startswith(self.begin) else self.begin + text

    # What the towers do.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        return [self._encoded(towers, item) for item in items]

    def _encoded(self, towers: nn.ModuleDict, item: MediaInput) -> Encoded:
        tower, padding = vision_of(towers), towers["padding"].get_parameter("weight")
        crops = item.features["pixel_values"].to(padding)
        count, length = crops.shape[:2]
        layout = VisionLayout(
            [length] * count, position_embeds=tower.positions.weight.repeat(count, 1)
        )
        inner = tuple(tap for tap in self.taps if tap < self.vision["n_layers"])
        last, tapped = tower(crops.flatten(0, 1), layout, inner)
        found = dict(zip(inner, tapped, strict=True))
        features = torch.cat([found.get(tap, last) for tap in self.taps], dim=-1)
        # The authors give a crop no features whose every value is -1: black, as they normalise.
        shown = item.features["shown"].to(padding.device)
        features = features.unflatten(0, (count, -1)) * shown[:, None, None]
        # They tell each crop of the next one's padding, of which there is none, and the last that
        # it is partly padding.
        features[-1] += padding[1]
        embeds = picture_features(towers, features, item.details["grid"], self.margins)
        return Encoded(embeds, adds=True)


FAMILY = JinaVLM
