"""InternVL 3 (arXiv:2504.10479) as Transformers lays it out: square tiles, patches merged four to a
token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from opsin.errors import InputError
from opsin.families.backbones import BackboneFamily
from opsin.families.base import Encoded, MediaInput, features_of
from opsin.families.clip_shape import later_layers, layer_counts, one_side, tile_features
from opsin.families.llama_shape import ACTIVATIONS, EXPERT_RENAME, LLAMA_RENAME
from opsin.families.options import switch_option
from opsin.kernels import Kernels
from opsin.media.sampling import Chooser, Video, VideoInfo
from opsin.towers import pixels
from opsin.towers.projectors import MLPProjector
from opsin.towers.vit import VisionTransformer, ViTConfig, grid_coordinates, vision_of
from opsin.types import Grounding

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_PATCHES = 128
FRAMES = 8
LAYER = r"^(towers\.vision\.layers\.\d+)"


class InternVL(BackboneFamily):
    """A tower with scaled blocks, tiles in the grid nearest to the picture's proportions."""

    message_format = "list_with_image_type"
    modalities = ("image", "video")
    placeholders = {"image": "<IMG_CONTEXT>", "video": "<video>"}
    media_tokens = {"video": "<IMG_CONTEXT>"}
    grounding = (Grounding("ref_det", 1000),)
    processor_options = ("crop_to_patches", "min_patches", "max_patches")
    tied_default = True
    rename = (
        (r"^(model\.)?vision_tower\.", "towers.vision."),
        (r"^towers\.vision\.embeddings\.cls_token$", "towers.vision.class_token"),
        (r"^towers\.vision\.embeddings\.patch_embeddings\.projection\.", "towers.vision.patch."),
        (r"^towers\.vision\.embeddings\.position_embeddings$", "towers.vision.positions.weight"),
        (r"^towers\.vision\.layernorm\.", "towers.vision.post_norm."),
        (r"^towers\.vision\.encoder\.layer\.", "towers.vision.layers."),
        (LAYER + r"\.attention\.q_proj\.(\w+)$", r"\1.attention.qkv.\2[0]"),
        (LAYER + r"\.attention\.k_proj\.(\w+)$", r"\1.attention.qkv.\2[1]"),
        (LAYER + r"\.attention\.v_proj\.(\w+)$", r"\1.attention.qkv.\2[2]"),
        (LAYER + r"\.attention\.projection_layer\.", r"\1.attention.out."),
        (LAYER + r"\.lambda_1$", r"\1.attention_scale.weight"),
        (LAYER + r"\.lambda_2$", r"\1.mlp_scale.weight"),
        (LAYER + r"\.layernorm_before\.", r"\1.attention_norm."),
        (LAYER + r"\.layernorm_after\.", r"\1.mlp_norm."),
        (LAYER + r"\.mlp\.fc1\.", r"\1.mlp.up."),
        (LAYER + r"\.mlp\.fc2\.", r"\1.mlp.down."),
        (r"^(model\.)?multi_modal_projector\.layer_norm\.", "towers.projector.norm."),
        (r"^(model\.)?multi_modal_projector\.linear_1\.", "towers.projector.up."),
        (r"^(model\.)?multi_modal_projector\.linear_2\.", "towers.projector.down."),
        *EXPERT_RENAME,
        *LLAMA_RENAME,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        processor_config = {"image_mean": MEAN, "image_std": STD, **processor_config}
        super().__init__(config, processor_config)
        vision = config["vision_config"]
        self.vision: dict[str, Any] = vision
        self.patch = one_side(vision.get("patch_size", 14))
        self.tile = one_side(vision.get("image_size", 448))
        self.merge = int(1 / config.get("downsample_ratio", 0.5))
        self.layers = vision.get("num_hidden_layers", 24)
        selected = config.get("vision_feature_layer", -1)
        self.counts = [] if selected == -1 else layer_counts(selected, self.layers)
        later = later_layers(self.counts[0], self.layers) if self.counts else ()
        self.ignored = (r"\.embeddings\.mask_token$", *later)

    def extra_eos(self) -> tuple[str, ...]:
        return ("<|im_end|>",)

    def vit_config(self) -> ViTConfig:
        """The vision transformer's shape."""
        vision = self.vision
        bias = bool(vision.get("attention_bias", False))
        rms = vision.get("norm_type", "layer_norm") == "rms_norm"
        return ViTConfig(
            patch_dim=vision.get("num_channels", 3) * self.patch**2,
            hidden=vision.get("hidden_size", 1024),
            layers=self.counts[0] if self.counts else self.layers,
            heads=vision.get("num_attention_heads", 16),
            mlp_hidden=vision.get("intermediate_size", 4096),
            activation=ACTIVATIONS[vision.get("hidden_act", "gelu")],
            norm="rms" if rms else "layer",
            norm_eps=vision.get("layer_norm_eps", 1e-6),
            qkv_bias=bias,
            positions=(self.tile // self.patch) ** 2 + 1,
            class_token=True,
            post_norm=not self.counts and not vision.get("use_mean_pooling", True),
            layer_scale=True,
            qk_norm="rms" if vision.get("use_qk_norm", False) else None,
        )

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit, hidden = self.vit_config(), self.decoder().hidden
        merged = vit.hidden * self.merge**2
        projector = MLPProjector(
            kernels,
            merged,
            hidden,
            hidden,
            activation=ACTIVATIONS[self.config.get("projector_hidden_act", "gelu")],
            norm_kind="layer",
            norm_eps=1e-5,
        )
        return nn.ModuleDict({"vision": VisionTransformer(kernels, vit), "projector": projector})

    # Pictures.

    @property
    def tile_tokens(self) -> int:
        """Tokens that a tile becomes."""
        return int((self.tile // self.patch // self.merge) ** 2)

    def patch_limits(self, options: Mapping[str, Any]) -> tuple[int, int]:
        """Fewest and most tiles, from the request or the checkpoint."""
        if not switch_option(options, "crop_to_patches", True):
            return 1, 1
        config = self.processor_config
        low = options.get("min_patches", config.get("min_patches", 1))
        high = options.get("max_patches", config.get("max_patches", 12))
        if type(low) is not int or type(high) is not int or not 1 <= low <= high <= MAX_PATCHES:
            raise InputError(
                f"min_patches {low!r} and max_patches {high!r} are not a range of tiles",
                remedy=f"Give whole numbers from 1 to {MAX_PATCHES}, the first not larger",
                param="processor_kwargs",
            )
        return low, high

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        side, resample = self.tile, self.processor_config.get("resample", 3)
        columns, rows = nearest_grid(*image.size, side, *self.patch_limits(options))
        canvas = pixels.resize(image, columns * side, rows * side, resample)
        places = (
            (x, y) for y in range(0, canvas.height, side) for x in range(0, columns * side, side)
        )
        tiles = [canvas.crop((x, y, x + side, y + side)) for x, y in places]
        if len(tiles) > 1:
            tiles.append(pixels.resize(image, side, side, resample))
        tokens = len(tiles) * self.tile_tokens
        return MediaInput(
            kind="image",
            features={"pixel_values": pixels.levels(tiles)},
            levels=pixels.normalisation(self.processor_config),
            text=f"<img>{self.media_token('image') * tokens}</img>",
            num_tokens=tokens,
            size=image.size,
            processed_size=canvas.size,
        )

    def frame_chooser(self, options: Mapping[str, Any]) -> Chooser:
        """The middle frames of equal parts of the video, 8 parts unless asked otherwise."""

        def choose(info: VideoInfo) -> list[int]:
            rate = options.get("fps")
            parts = FRAMES if rate is None else int(info.duration * rate)
            parts = max(1, min(parts, options.get("max_frames", FRAMES), info.num_frames))
            step = info.num_frames / parts
            return [int(step / 2 + i * step) for i in range(parts)]

        return choose

    def prepare_video(self, video: Video, options: Mapping[str, Any]) -> MediaInput:
        """One tile a frame, each on a line of its own."""
        del options
        frames = torch.from_numpy(video.frames).permute(0, 3, 1, 2)
        resized = pixels.resize_frames(frames, self.tile, self.tile)
        one = f"<img>{self.media_token('video') * self.tile_tokens}</img>"
        return MediaInput(
            kind="video",
            features={"pixel_values": resized},
            levels=pixels.normalisation(self.processor_config),
            text="\n".join(f"Frame{i + 1}: {one}" for i in range(len(resized))),
            num_tokens=len(resized) * self.tile_tokens,
            processed_size=(self.tile, self.tile),
        )

    # Towers.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        count = self.tile // self.patch
        places = grid_coordinates(count, count, self.merge)
        positions = torch.cat((torch.zeros(1).long(), places[:, 0] * count + places[:, 1] + 1))
        features = tile_features(
            vision_of(towers),
            features_of(items, "pixel_values"),
            self.patch,
            merge=self.merge,
            positions=positions,
            counts=self.counts,
            levels=pixels.normalisation(self.processor_config),
        )
        embeds = towers["projector"](features[:, 1:].flatten(0, 1))
        return [Encoded(part) for part in embeds.split([item.num_tokens for item in items])]


def nearest_grid(width: int, height: int, tile: int, low: int, high: int) -> tuple[int, int]:
    """The (columns, rows) of `low` to `high` tiles whose proportions are nearest to the picture's.

    Of equals the larger is taken while the picture has more than half its pixels.
    """
    ratio = width / height
    grids = [
        (columns, rows)
        for columns in range(1, high + 1)
        for rows in range(1, high // columns + 1)
        if columns * rows >= low
    ]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(ratio - columns / rows)
        enough = width * height > 0.5 * tile**2 * columns * rows
        if distance < least or (distance == least and enough):
            best, least = (columns, rows), distance
    return best


FAMILY = InternVL
