"""Qwen2-VL (arXiv:2409.12191): pictures of any size, 2D rope in the tower, M-RoPE in the
decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from opsin.checkpoint.weights import Rename
from opsin.decoder.config import DecoderConfig
from opsin.families.base import Encoded, Family, MediaInput, features_of
from opsin.families.llama_shape import llama_decoder, rope_parameters
from opsin.families.mrope import TokenGrid, mrope_positions
from opsin.families.options import pixel_limits, switch_option
from opsin.families.patch_grids import (
    CAP,
    RESAMPLING,
    capped,
    clip_patches,
    smart_resize,
    spaced_frames,
    whole_groups,
)
from opsin.families.qwen_names import QWEN_RENAME
from opsin.kernels import Kernels
from opsin.media.sampling import DEFAULT_FPS, Chooser, Video
from opsin.nn.norm import NormKind
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

    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    message_format = "list_with_image"
    placeholders = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    processor_options: ClassVar[tuple[str, ...]] = (
        "min_pixels",
        "max_pixels",
        CAP,
    )
    image_pixels: ClassVar[tuple[int, int]] = (56 * 56, 28 * 28 * 1280)
    video_pixels: ClassVar[tuple[int, int]] = (128 * 28 * 28, 768 * 28 * 28)
    # Settings of pictures that do not hold for the videos of a checkpoint that states no others.
    picture_settings: ClassVar[tuple[str, ...]] = ()
    merger_norm: ClassVar[NormKind | None] = None  # the merger's kind, where not the tower's
    grounding: tuple[Grounding, ...] = (Grounding("box_tags", 1000), Grounding("json_boxes"))
    tasks = {
        "ocr": Task("Read all the text in the image.", "the text of a picture"),
        "describe": Task("Describe this image.", "a description"),
        "locate": Task(
            "Locate {text}, output its bbox coordinates using JSON format.",
            "boxes around what TEXT names",
        ),
    }
    rename: tuple[Rename, ...] = QWEN_RENAME

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

    def merged_width(self) -> int:
        """Features of a token that the merger gives."""
        return int(self.vision["hidden_size"])

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit = self.vit_config()
        merged = vit.hidden * self.merge**2
        merger = MLPProjector(
            kernels,
            merged,
            merged,
            self.merged_width(),
            norm_kind=self.merger_norm or vit.norm,
            norm_dim=vit.hidden,
        )
        return nn.ModuleDict({"vision": VisionTransformer(kernels, vit), "merger": merger})

    # Pictures.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        patch, frames = self.vision["patch_size"], self.vision.get("temporal_patch_size", 2)
        limits = pixel_limits(options, self.processor_config, self.image_pixels)
        width, height = smart_resize(image.width, image.height, patch * self.merge, limits)
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

    # Videos.

    @property
    def video_config(self) -> dict[str, Any]:
        """The video processor's settings; older checkpoints state those of pictures only."""
        shared = {k: v for k, v in self.processor_config.items() if k not in self.picture_settings}
        return self.processor_config.get("video_processor") or shared

    def frame_chooser(self, options: Mapping[str, Any]) -> Chooser:
        config = self.video_config
        stated = config.get("fps") if config.get("do_sample_frames") else None
        return spaced_frames(
            options.get("fps") or stated or DEFAULT_FPS,
            config.get("min_frames") or 4,
            options.get("max_frames") or config.get("max_frames") or 768,
            self.vision.get("temporal_patch_size", 2),
        )

    def frame_size(self, frames: Tensor, options: Mapping[str, Any]) -> tuple[int, int]:
        """The (width, height) that frames (frames, 3, h, w) get; limits are those of one."""
        height, width = frames.shape[-2:]
        config, factor = self.video_config, self.vision["patch_size"] * self.merge
        limits = pixel_limits(options, config, self.video_pixels, len(frames))
        if switch_option(options, CAP, config.get(CAP)):
            total = int(config.get("max_video_tokens", 128000) * factor**2 * 0.9)
            share = total * self.vision.get("temporal_patch_size", 2) // len(frames)
            limits = capped(limits, share)
        return smart_resize(width, height, factor, limits)

    def frames(self, video: Video) -> Tensor:
        """What the tower is shown of a video.  # (frames, 3, height, width), uint8"""
        return torch.from_numpy(video.frames).permute(0, 3, 1, 2)

    def prepare_video(self, video: Video, options: Mapping[str, Any]) -> MediaInput:
        patch, group = self.vision["patch_size"], self.vision.get("temporal_patch_size", 2)
        config, frames = self.video_config, self.frames(video)
        width, height = self.frame_size(frames, options)
        resized = pixels.resize_frames(frames, width, height, RESAMPLING[config.get("resample", 3)])
        values = pixels.normalised_frames(resized, *pixels.normalisation(config))
        patches = clip_patches(whole_groups(values, group), patch, self.merge, group)
        grid = torch.tensor([-(-len(frames) // group), height // patch, width // patch])
        item = MediaInput("video", {"pixel_values": patches, "grid": grid}, "", 0)
        item.num_tokens = sum(part.size for part in self.grids(item))
        item.text = self.video_text(video, item)
        item.processed_size = (width, height)
        return item

    def video_text(self, video: Video, item: MediaInput) -> str:
        """What stands for a video in the prompt."""
        del video
        return self.media_token("video") * item.num_tokens

    def grids(self, item: MediaInput) -> list[TokenGrid]:
        """The runs of tokens that a medium becomes, from the first one's place on."""
        frames, rows, columns = item.features["grid"].tolist()
        return [TokenGrid(frames, rows // self.merge, columns // self.merge)]

    def positions(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> tuple[Tensor, int]:
        runs = [(item.indices, self.grids(item)) for item in media]
        return mrope_positions(len(token_ids), runs)

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
        return features_of(items, "pixel_values").to(weight)

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        features, _ = towers["vision"](
            self.patches(towers, items), self.layout(vision_of(towers), items)
        )
        merged = towers["merger"](features)
        return [Encoded(part) for part in merged.split([item.num_tokens for item in items])]


FAMILY = Qwen2VL
