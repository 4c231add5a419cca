"""ERNIE 4.5 VL: experts for text and others for pictures, and a resampler behind the tower."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opsin.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    GroupedMoEConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
)
from opsin.families.base import Encoded, MediaInput
from opsin.families.ernie_names import resampler_names
from opsin.families.frame_times import with_times
from opsin.families.llama_shape import ACTIVATIONS, EXPERT_RENAME, llama_decoder
from opsin.families.mrope import TokenGrid
from opsin.families.patch_grids import spaced_frames, whole_groups
from opsin.families.qwen2_vl import Qwen2VL
from opsin.kernels import Kernels
from opsin.media.sampling import Chooser, Video
from opsin.nn.linear import Linear
from opsin.nn.norm import norm
from opsin.towers.projectors import MLPProjector
from opsin.towers.vit import VisionTransformer, ViTConfig, vision_of

LOG = logging.getLogger("opsin")
# What the authors' own processor and template call the placeholders.
OLD_PLACEHOLDERS = {"image": "<|image@placeholder|>", "video": "<|video@placeholder|>"}
# Ids of the tokens that go to the second group of experts, where the config does not state them.
SEEN = {
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
    "video_token_id": 103367,
}


class Ernie45MoEVL(Qwen2VL):
    """The tower's layers are Qwen2-VL's; the config is flat as published, nested as Transformers
    has it.
    """

    message_format = "list_with_image_url_first"
    placeholders = {"image": "<|IMAGE_PLACEHOLDER|>", "video": "<|VIDEO_PLACEHOLDER|>"}
    image_pixels = (56 * 56, 6177 * 28 * 28)
    video_pixels = (299 * 28 * 28, 1196 * 28 * 28)
    picture_settings = ("min_pixels", "max_pixels")

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.video_token = self.placeholders["video"]
        self.told = False
        self.rename = (*resampler_names(self.num_experts), *EXPERT_RENAME, *Qwen2VL.rename)

    # Configs.

    @property
    def num_experts(self) -> int:
        """Experts of one kind; the published config counts both kinds, equal, in a list."""
        count = self.text_config.get("moe_num_experts", 64)
        return int(count if isinstance(count, int) else count[0])

    @property
    def vision(self) -> dict[str, Any]:
        vision = super().vision
        merges = {
            "spatial_merge_size": self.config.get("spatial_conv_size", 2),
            "temporal_merge_size": self.config.get("temporal_conv_size", 2),
            "temporal_patch_size": 1,
        }
        return {**merges, **vision}

    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings", True))

    def sparse(self) -> list[bool]:
        """Which layers have experts."""
        text = self.text_config
        count = text["num_hidden_layers"]
        kinds = text.get("mlp_layer_types")
        if kinds is not None:
            return [kind == "sparse" for kind in kinds]
        first, last = text.get("moe_layer_start_index", 1), text.get("moe_layer_end_index", count)
        first = first if isinstance(first, int) else min(first)
        last = last if isinstance(last, int) else max(last)
        step = text.get("moe_layer_interval", 1)
        return [(i + 1) % step == 0 and first <= i <= last for i in range(count)]

    # The decoder.

    def decoder(self) -> DecoderConfig:
        text = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, **self.text_config}
        text["attention_bias"] = text["mlp_bias"] = bool(text.get("use_bias"))
        rope = text.get("rope_parameters") or {}
        # Published configs say how many frequencies turn by time; rows and columns share the rest.
        pairs = (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]) // 2
        stated = rope.get("mrope_section", (0, 0, text.get("freq_allocation", 20)))
        axes = (1, 2) * ((pairs - stated[2]) // 2) + (0,) * stated[2]
        plain = llama_decoder(text, tied=self.tied(), axes=axes)
        layers = tuple(
            self.layer(layer, sparse)
            for layer, sparse in zip(plain.layers, self.sparse(), strict=True)
        )
        return dataclasses.replace(plain, layers=layers)

    def layer(self, plain: LayerConfig, sparse: bool) -> LayerConfig:
        """A layer with neighbouring features paired in rope, and experts if it has them."""
        assert isinstance(plain.attention, AttentionConfig)
        assert plain.attention.rope is not None
        rope = dataclasses.replace(plain.attention.rope, pairs="adjacent")
        attention = dataclasses.replace(plain.attention, rope=rope)
        if not sparse:
            return dataclasses.replace(plain, attention=attention)
        text = self.text_config
        activation = ACTIVATIONS[text.get("hidden_act", "silu")]
        widths = text.get("moe_intermediate_size") or (1536, 512)
        groups = tuple(
            MoEConfig(
                experts=self.num_experts,
                top_k=text.get("moe_k", 6),
                hidden=width,
                activation=activation,
                precise_router=True,
                min_total=text.get("moe_norm_min", 1e-12),
            )
            for width in widths
        )
        shared = text.get("moe_num_shared_experts") or 0
        block = MLPConfig(widths[0] * shared, activation, bool(text.get("use_bias")))
        mlp = GroupedMoEConfig(groups, block if shared else None, selection_bias=True)
        return dataclasses.replace(plain, attention=attention, mlp=mlp)

    def expert_groups(self, token_ids: Sequence[int]) -> Tensor | None:
        """A medium's tokens and the marks around it go to the second group."""
        marks = [self.config.get(name, default) for name, default in SEEN.items()]
        patch = self.config.get("image_token_id", self.config.get("im_patch_id", 100295))
        groups = torch.isin(torch.tensor(token_ids), torch.tensor([patch, *marks])).long()
        return groups if groups.any() else None

    # The tower.

    def vit_config(self) -> ViTConfig:
        vision = self.vision
        hidden = vision["hidden_size"]
        return ViTConfig(
            patch_dim=self.patch_dim(),
            hidden=hidden,
            layers=vision["depth"],
            heads=vision["num_heads"],
            mlp_hidden=int(vision.get("intermediate_size") or hidden * vision["mlp_ratio"]),
            activation=ACTIVATIONS[vision.get("hidden_act", "quick_gelu")],
            norm_eps=vision.get("rms_norm_eps", 1e-6),
            patch_bias=False,
            post_norm=True,
        )

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit, text = self.vit_config(), self.text_config
        wide = vit.hidden * self.merge**2
        longer = wide * self.vision["temporal_merge_size"]
        out = text["hidden_size"]
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "spatial": MLPProjector(kernels, wide, wide, wide),
                "spatial_norm": norm(kernels, "layer", wide, vit.norm_eps),
                "temporal": MLPProjector(kernels, longer, wide, wide),
                "temporal_norm": norm(kernels, "layer", wide, vit.norm_eps),
                "projector": Linear(kernels, wide, out, bias=True),
                "after_norm": norm(kernels, "rms", out, text.get("rms_norm_eps", 1e-5)),
            }
        )

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        layout = self.layout(vision_of(towers), items)
        features, _ = towers["vision"](self.patches(towers, items), layout)
        x = towers["spatial_norm"](towers["spatial"](features))
        x = self.in_pairs(x, items)
        x = towers["temporal_norm"](towers["temporal"](x))
        merged = towers["after_norm"](towers["projector"](x))
        return [Encoded(part) for part in merged.split([item.num_tokens for item in items])]

    def in_pairs(self, x: Tensor, items: Sequence[MediaInput]) -> Tensor:
        """Features side by side with those of the next frame; a picture is both of a pair."""
        pairs = []
        grids = [item.features["grid"].tolist() for item in items]
        sizes = [frames * rows * columns // self.merge**2 for frames, rows, columns in grids]
        for part, (frames, *_) in zip(x.split(sizes), grids, strict=True):
            by_frame = part.unflatten(0, (frames, -1))
            later = by_frame[1::2] if frames > 1 else by_frame
            pairs.append(torch.cat((by_frame[::2], later), dim=-1).flatten(0, 1))
        return torch.cat(pairs)

    # Pictures.

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        for kind, old in OLD_PLACEHOLDERS.items():
            text = text.replace(old, self.placeholders[kind])
        return super().expand(text, media)

    # Videos.

    def name_tokens(self, name_of: Callable[[int], str | None]) -> None:
        """The authors' vocabulary has no token for videos; theirs is that of pictures."""
        stated = name_of(self.config.get("video_token_id", 103367))
        if stated != self.placeholders["video"]:
            self.video_token = self.placeholders["image"]

    def media_token(self, kind: str) -> str:
        return self.video_token if kind == "video" else super().media_token(kind)

    def frame_chooser(self, options: Mapping[str, Any]) -> Chooser:
        config = self.video_config
        most = options.get("max_frames") or config.get("max_frames") or 180
        rate = options.get("fps") or config.get("fps")
        return spaced_frames(rate, config.get("min_frames") or 16, most)

    def frames(self, video: Video) -> Tensor:
        if not self.video_config.get("draw_on_frames", True):
            return whole_groups(super().frames(video), self.vision["temporal_merge_size"])
        font = self.video_config.get("font_file")
        if font is None and not self.told:
            LOG.warning("no font in the checkpoint: times are written on frames in another one")
            self.told = True
        written = with_times(video.frames, video.timestamps, font)
        frames = super().frames(dataclasses.replace(video, frames=written))
        return whole_groups(frames, self.vision["temporal_merge_size"])

    def grids(self, item: MediaInput) -> list[TokenGrid]:
        (grid,) = super().grids(item)
        merged = self.vision["temporal_merge_size"] if item.kind == "video" else 1
        return [dataclasses.replace(grid, frames=grid.frames // merged)]


FAMILY = Ernie45MoEVL
