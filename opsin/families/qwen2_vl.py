"""Qwen2-VL (arXiv:2409.12191): pictures of any size, 2D rope in the tower, M-RoPE in the
decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from opsin.decoder.config import DecoderConfig
from opsin.errors import MediaError
from opsin.families.base import Encoded, Family, MediaInput
from opsin.families.llama_shape import LLAMA_RENAME, llama_decoder, rope_parameters
from opsin.kernels import Kernels
from opsin.nn.rope import contiguous_axes
from opsin.towers import pixels
from opsin.towers.projectors import MLPProjector
from opsin.towers.vit import (
    VisionLayout,
    VisionTransformer,
    ViTConfig,
    axial_angles,
    grid_coordinates,
    vision_of,
)
from opsin.types import Grounding, Task


class Qwen2VL(Family):
    """The first of the line; the later ones say what they change."""

    modalities = ("image",)
    message_format = "list_with_image"
    placeholders = {"image": "<|image_pad|>"}
    processor_options = ("min_pixels", "max_pixels")
    grounding: tuple[Grounding, ...] = (Grounding("box_tags", 1000), Grounding("json_boxes"))
    tasks = {
        "ocr": Task("Read all the text in the image.", "the text of a picture"),
        "describe": Task("Describe this image.", "a description"),
        "locate": Task(
            "Locate {text}, output its bbox coordinates using JSON format.",
            "boxes around what TEXT names",
        ),
    }
    rename = (
        (r"^(model\.)?visual\.", "towers.vision."),
        (r"^towers\.vision\.merger\.ln_q\.", "towers.merger.norm."),
        (r"^towers\.vision\.merger\.mlp\.0\.", "towers.merger.up."),
        (r"^towers\.vision\.merger\.mlp\.2\.", "towers.merger.down."),
        (r"^towers\.vision\.patch_embed\.proj\.", "towers.vision.patch."),
        (r"^towers\.vision\.blocks\.(\d+)\.norm1\.", r"towers.vision.layers.\1.attention_norm."),
        (r"^towers\.vision\.blocks\.(\d+)\.norm2\.", r"towers.vision.layers.\1.mlp_norm."),
        (r"^towers\.vision\.blocks\.(\d+)\.attn\.qkv\.", r"towers.vision.layers.\1.attention.qkv."),
        (
            r"^towers\.vision\.blocks\.(\d+)\.attn\.proj\.",
            r"towers.vision.layers.\1.attention.out.",
        ),
        (r"^towers\.vision\.blocks\.(\d+)\.mlp\.fc1\.", r"towers.vision.layers.\1.mlp.up."),
        (r"^towers\.vision\.blocks\.(\d+)\.mlp\.fc2\.", r"towers.vision.layers.\1.mlp.down."),
        *LLAMA_RENAME,
    )

    @property
    def vision(self) -> dict[str, Any]:
        """The tower's config."""
        vision: dict[str, Any] = self.config["vision_config"]
        return vision

    @property
    def merge(self) -> int:
        """Patches per side of the square that becomes one token."""
        return int(self.vision.get("spatial_merge_size", 2))

    def decoder(self) -> DecoderConfig:
        rope = rope_parameters(self.text_config)
        axes = contiguous_axes(rope["mrope_section"])
        return llama_decoder(
            self.text_config, tied=self.tied(), axes=axes, qkv_bias=True, out_bias=False
        )

    def tied(self) -> bool:
        """Whether the head is the embedding table; older configs say so on the inside only."""
        text = self.text_config.get("tie_word_embeddings", False)
        return bool(self.config.get("tie_word_embeddings", text))

    def vit_config(self) -> ViTConfig:
        """The vision transformer's shape."""
        vision = self.vision
        hidden = vision["embed_dim"]
        return ViTConfig(
            patch_dim=self.patch_dim(),
            hidden=hidden,
            layers=vision["depth"],
            heads=vision["num_heads"],
            mlp_hidden=int(hidden * vision.get("mlp_ratio", 4)),
            activation=vision.get("hidden_act", "quick_gelu"),
            patch_bias=False,
        )

    def patch_dim(self) -> int:
        """Values in one patch: channels, frames, height and width."""
        vision = self.vision
        channels = vision.get("in_channels", 3)
        return int(channels * vision.get("temporal_patch_size", 2) * vision["patch_size"] ** 2)

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit = self.vit_config()
        merged = vit.hidden * self.merge**2
        merger = MLPProjector(
            kernels,
            merged,
            merged,
            self.vision["hidden_size"],
            norm_kind=vit.norm,
            norm_dim=vit.hidden,
        )
        return nn.ModuleDict({"vision": VisionTransformer(kernels, vit), "merger": merger})

    # Pictures.

    def pixel_limits(self, options: Mapping[str, Any]) -> tuple[int, int]:
        """Fewest and most pixels after resizing: from the request, else the checkpoint."""
        config = self.processor_config
        size = config.get("size") or {}
        low = config.get("min_pixels") or size.get("shortest_edge") or 56 * 56
        high = config.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
        return int(options.get("min_pixels", low)), int(options.get("max_pixels", high))

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        patch, frames = self.vision["patch_size"], self.vision.get("temporal_patch_size", 2)
        factor = patch * self.merge
        width, height = smart_resize(image.width, image.height, factor, self.pixel_limits(options))
        resized = pixels.resize(image, width, height, self.processor_config.get("resample", 3))
        values = pixels.normalised(resized, *pixels.normalisation(self.processor_config))
        flat = pixels.patchify(values, patch, self.merge).unflatten(1, (3, 1, -1))
        patches = flat.expand(-1, -1, frames, -1).flatten(1)
        rows, columns = height // patch, width // patch
        tokens = rows * columns // self.merge**2
        return MediaInput(
            kind="image",
            features={"pixel_values": patches, "grid": torch.tensor([1, rows, columns])},
            text=self.media_token("image") * tokens,
            num_tokens=tokens,
            size=image.size,
            processed_size=(width, height),
        )

    def positions(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> tuple[Tensor, int]:
        """M-RoPE: text counts on all three axes, a picture's tokens by frame, row and column."""
        parts: list[Tensor] = []
        done, position = 0, 0
        for item in sorted(media, key=lambda item: int(item.indices[0])):
            start = int(item.indices[0])
            parts.append(torch.arange(position, position + start - done).expand(3, -1))
            position += start - done
            frames, rows, columns = item.features["grid"].tolist()
            rows, columns = rows // self.merge, columns // self.merge
            grid = torch.cartesian_prod(
                torch.arange(frames), torch.arange(rows), torch.arange(columns)
            )
            parts.append(grid.T + position)
            position += max(rows, columns)
            done = start + item.num_tokens
        parts.append(torch.arange(position, position + len(token_ids) - done).expand(3, -1))
        return torch.cat(parts, dim=1), position + len(token_ids) - done

    # Towers.

    def layout(self, tower: VisionTransformer, items: Sequence[MediaInput]) -> VisionLayout:
        """How the patches of several pictures lie together, with their rope angles."""
        device = tower.patch.weight.device
        grids = [item.features["grid"].tolist() for item in items]
        lengths = [rows * columns for frames, rows, columns in grids for _ in range(frames)]
        coordinates = torch.cat(
            [
                grid_coordinates(rows, cols, self.merge).repeat(frames, 1)
                for frames, rows, cols in grids
            ]
        )
        head_dim = tower.config.hidden // tower.config.heads
        angles = axial_angles(coordinates.to(device), head_dim, 10000.0)
        return VisionLayout(lengths, angles=angles)

    def patches(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> Tensor:
        """All patches of several pictures, (patches, patch_dim), where the tower wants them."""
        weight = vision_of(towers).patch.weight
        return torch.cat([item.features["pixel_values"] for item in items]).to(weight)

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        features, _ = towers["vision"](
            self.patches(towers, items), self.layout(vision_of(towers), items)
        )
        merged = towers["merger"](features)
        return [Encoded(part) for part in merged.split([item.num_tokens for item in items])]


def smart_resize(width: int, height: int, factor: int, limits: tuple[int, int]) -> tuple[int, int]:
    """The size nearest to the picture's whose sides are multiples of `factor` within pixel limits.

    Raises MediaError for a picture more than 200 times as long as wide, as the reference does.
    """
    if max(width, height) > 200 * min(width, height):
        raise MediaError(
            f"The picture is too narrow ({width}x{height})",
            why="this model takes pictures up to 200 times as long as wide",
            remedy="Crop it or pad it",
            param="image",
        )
    low, high = limits
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > high:
        shrink = math.sqrt(width * height / high)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
    elif new_width * new_height < low:
        grow = math.sqrt(low / (width * height))
        new_width = math.ceil(width * grow / factor) * factor
        new_height = math.ceil(height * grow / factor) * factor
    return new_width, new_height


FAMILY = Qwen2VL
