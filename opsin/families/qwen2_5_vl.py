"""Qwen2.5-VL (arXiv:2502.13923): windowed attention in the tower, gated MLPs and RMS norms there
too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opsin.families.base import Encoded, MediaInput
from opsin.families.mrope import TokenGrid
from opsin.families.qwen2_vl import Qwen2VL
from opsin.media.sampling import Video
from opsin.towers.vit import VisionLayout, ViTConfig, vision_of
from opsin.types import Grounding


class Qwen25VL(Qwen2VL):
    """Changes the tower: most layers look only inside windows, in whose order the patches lie."""

    message_format = "list_with_image_first"
    grounding = (Grounding("json_boxes"),)
    rename = (
        (r"\.blocks\.(\d+)\.mlp\.gate_proj\.(\w+)$", r".layers.\1.mlp.up.\2[0]"),
        (r"\.blocks\.(\d+)\.mlp\.up_proj\.(\w+)$", r".layers.\1.mlp.up.\2[1]"),
        (r"\.blocks\.(\d+)\.mlp\.down_proj\.", r".layers.\1.mlp.down."),
        *Qwen2VL.rename,
    )

    def vit_config(self) -> ViTConfig:
        vision = self.vision
        full = set(vision["fullatt_block_indexes"])
        return ViTConfig(
            patch_dim=self.patch_dim(),
            hidden=vision["hidden_size"],
            layers=vision["depth"],
            heads=vision["num_heads"],
            mlp_hidden=vision["intermediate_size"],
            activation=vision.get("hidden_act", "silu"),
            norm="rms",
            gated_mlp=True,
            patch_bias=False,
            windowed=frozenset(range(vision["depth"])) - full,
        )

    def merged_width(self) -> int:
        return int(self.vision["out_hidden_size"])

    # Videos.

    def prepare_video(self, video: Video, options: Mapping[str, Any]) -> MediaInput:
        item = super().prepare_video(video, options)
        kept = len(video.indices) / video.info.num_frames * video.info.fps
        seconds = torch.tensor(self.vision.get("temporal_patch_size", 2) / kept)
        item.details["interval"] = float(self.vision.get("tokens_per_second", 4) * seconds)
        return item

    def grids(self, item: MediaInput) -> list[TokenGrid]:
        (grid,) = super().grids(item)
        return [dataclasses.replace(grid, interval=item.details.get("interval", 1.0))]

    # The tower.

    def window_order(self, items: Sequence[MediaInput]) -> tuple[Tensor, list[int]]:
        """The merge blocks of all pictures in window order, and each window's number of patches."""
        side = self.vision["window_size"] // self.merge // self.vision["patch_size"]
        orders: list[Tensor] = []
        windows: list[int] = []
        done = 0
        for item in items:
            frames, rows, columns = item.features["grid"].tolist()
            rows, columns = rows // self.merge, columns // self.merge
            blocks = torch.arange(frames * rows * columns).view(frames, rows, columns) + done
            for frame in blocks:
                for strip in frame.split(side):
                    pieces = [window.flatten() for window in strip.split(side, dim=1)]
                    orders.extend(pieces)
                    windows.extend(len(piece) * self.merge**2 for piece in pieces)
            done += blocks.numel()
        return torch.cat(orders), windows

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        patches, plain = self.patches(towers, items), self.layout(vision_of(towers), items)
        order, windows = self.window_order(items)
        order = order.to(patches.device)
        assert plain.angles is not None
        cos, sin = (self.by_block(angle, order) for angle in plain.angles)
        layout = VisionLayout(plain.lengths, windows, angles=(cos, sin))
        features, _ = towers["vision"](self.by_block(patches, order), layout)
        merged = towers["merger"](features)[order.argsort()]
        return [Encoded(part) for part in merged.split([item.num_tokens for item in items])]

    def by_block(self, rows: Tensor, order: Tensor) -> Tensor:
        """Rows (patches, dim) with their merge blocks put in the given order."""
        return rows.unflatten(0, (-1, self.merge**2))[order].flatten(0, 1)


FAMILY = Qwen25VL
