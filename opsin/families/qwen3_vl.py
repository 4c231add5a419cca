"""Qwen3-VL (arXiv:2511.21631): interleaved M-RoPE, and tower features added to early decoder
layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opsin.decoder.config import DecoderConfig
from opsin.families.base import Encoded, MediaInput
from opsin.families.llama_shape import ACTIVATIONS, llama_decoder, rope_parameters
from opsin.families.mrope import TokenGrid
from opsin.families.options import pixel_limits, switch_option
from opsin.families.patch_grids import CAP, capped, clip_size, spanning_frames
from opsin.families.qwen2_vl import Qwen2VL
from opsin.kernels import Kernels
from opsin.media.sampling import Chooser, Video
from opsin.nn.rope import interleaved_axes
from opsin.towers import pixels
from opsin.towers.projectors import MLPProjector
from opsin.towers.vit import (
    VisionLayout,
    VisionTransformer,
    ViTConfig,
    grid_coordinates,
    resampled_positions,
    vision_of,
)
from opsin.types import Grounding, Task


class Qwen3VL(Qwen2VL):
    """Changes the tower's positions and merger, the decoder's rope, and adds deepstack."""

    message_format = "list_with_image_first"
    grounding = (Grounding("json_boxes", 1000),)
    video_pixels = (128 * 32 * 32, 768 * 32 * 32)
    picture_settings = ("min_pixels", "max_pixels")
    tasks = {
        **Qwen2VL.tasks,
        "locate": Task(
            'Locate every object that matches the description "{text}" in the image. '
            "Report bbox coordinates in JSON format.",
            "boxes around what TEXT describes",
        ),
        "detect": Task(
            'Locate every instance that belongs to the following categories: "{text}". '
            "Report bbox coordinates in JSON format.",
            "boxes around all things of some kinds, separated by commas",
        ),
    }
    rename = (
        (r"^(model\.)?visual\.merger\.linear_fc1\.", "towers.merger.up."),
        (r"^(model\.)?visual\.merger\.linear_fc2\.", "towers.merger.down."),
        (r"^(model\.)?visual\.merger\.norm\.", "towers.merger.norm."),
        (r"^(model\.)?visual\.deepstack_merger_list\.(\d+)\.", r"towers.deepstack.\2."),
        (r"^(model\.)?visual\.pos_embed\.", "towers.vision.positions."),
        (r"\.linear_fc1\.", ".fc1."),
        (r"\.linear_fc2\.", ".fc2."),
        (r"^(towers\.deepstack\.\d+)\.fc1\.", r"\1.up."),
        (r"^(towers\.deepstack\.\d+)\.fc2\.", r"\1.down."),
        *Qwen2VL.rename,
    )

    def decoder(self) -> DecoderConfig:
        rope = rope_parameters(self.text_config)
        axes = interleaved_axes(rope["mrope_section"])
        return llama_decoder(self.text_config, tied=self.tied(), axes=axes, qk_norm="rms")

    def vit_config(self) -> ViTConfig:
        vision = self.vision
        return ViTConfig(
            patch_dim=self.patch_dim(),
            hidden=vision["hidden_size"],
            layers=vision["depth"],
            heads=vision["num_heads"],
            mlp_hidden=vision["intermediate_size"],
            activation=ACTIVATIONS[vision["hidden_act"]],
            positions=vision["num_position_embeddings"],
        )

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit = self.vit_config()

        def merger(norm_dim: int) -> MLPProjector:
            merged = vit.hidden * self.merge**2
            out = self.vision["out_hidden_size"]
            return MLPProjector(
                kernels, merged, merged, out, norm_kind="layer", norm_dim=norm_dim or merged
            )

        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "merger": merger(vit.hidden),
                "deepstack": nn.ModuleList(
                    merger(0) for _ in self.vision["deepstack_visual_indexes"]
                ),
            }
        )

    # Videos.

    @property
    def video_config(self) -> dict[str, Any]:
        return {"image_mean": pixels.HALF, "image_std": pixels.HALF, **super().video_config}

    def frame_chooser(self, options: Mapping[str, Any]) -> Chooser:
        config = self.video_config
        most = options.get("max_frames") or config.get("max_frames") or 768
        rate = options.get("fps") or config.get("fps") or 2
        return spanning_frames(rate, config.get("min_frames") or 4, most)

    def frame_size(self, frames: Tensor, options: Mapping[str, Any]) -> tuple[int, int]:
        """Every frame's size; the checkpoint's limits are the clip's, a request's are a frame's."""
        count, (height, width) = len(frames), frames.shape[-2:]
        config, factor = self.video_config, self.vision["patch_size"] * self.merge
        low, high = pixel_limits({}, config, self.video_pixels)
        asked = pixel_limits(options, {}, (0, high), count)
        low, high = asked[0] * count or low, min(high, asked[1] * count)
        if switch_option(options, CAP, config.get(CAP)):
            allowed = config.get("max_video_tokens", 768) * factor**2
            low, high = capped((low, high), allowed, count)
        group = self.vision.get("temporal_patch_size", 2)
        return clip_size(max(count, group), width, height, (factor, group), (low, high))

    def video_text(self, video: Video, item: MediaInput) -> str:
        """Each group of frames after its time, between marks of its own."""
        frames, tokens = self.grids(item), self.media_token("video")
        group = self.vision.get("temporal_patch_size", 2)
        ends = [
            (video.timestamps[i], video.timestamps[min(i + group, len(video.timestamps)) - 1])
            for i in range(0, len(video.timestamps), group)
        ]
        return "".join(
            f"<{(first + last) / 2:.1f} seconds><|vision_start|>{tokens * grid.size}<|vision_end|>"
            for (first, last), grid in zip(ends, frames, strict=True)
        )

    def grids(self, item: MediaInput) -> list[TokenGrid]:
        (grid,) = super().grids(item)
        return [TokenGrid(1, grid.rows, grid.columns)] * grid.frames

    # The tower.

    def layout(self, tower: VisionTransformer, items: Sequence[MediaInput]) -> VisionLayout:
        plain = super().layout(tower, items)
        table = tower.positions.weight
        embeds = []
        for item in items:
            frames, rows, columns = item.features["grid"].tolist()
            coordinates = grid_coordinates(rows, columns, self.merge)
            resampled = resampled_positions(table, coordinates, rows, columns)
            embeds.append(resampled.repeat(frames, 1))
        return VisionLayout(plain.lengths, position_embeds=torch.cat(embeds), angles=plain.angles)

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        taps = tuple(self.vision["deepstack_visual_indexes"])
        layout = self.layout(vision_of(towers), items)
        features, tapped = towers["vision"](self.patches(towers, items), layout, taps)
        counts = [item.num_tokens for item in items]
        merged = towers["merger"](features).split(counts)
        adds = [
            merger(tap).split(counts)
            for merger, tap in zip(towers["deepstack"].children(), tapped, strict=True)
        ]
        return [Encoded(embeds, tuple(add[i] for add in adds)) for i, embeds in enumerate(merged)]


FAMILY = Qwen3VL
