"""What both DeepSeek-OCRs are: SAM's eye for pages, a small mixture of experts, and its tasks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from opsin.decoder.config import DecoderConfig
from opsin.families import bundled_template
from opsin.families.base import Family
from opsin.families.deepseek_v2_text import deepseek_decoder
from opsin.towers import pixels
from opsin.towers.sam import SamConfig
from opsin.types import Grounding, Task

GREY = (127, 127, 127)
CELLS = ("<td>", "</td>")  # what a table may repeat
# SAM's keys in Transformers' configs and in the authors'.
SAM_KEYS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "global_attn_indexes": "global_attn_indexes",
}


class DeepseekOCRShape(Family):
    """The parts that do not differ; the authors' boxes count a side as 999."""

    message_format = "image_token_newline"
    default_template = bundled_template("deepseek_ocr")
    grounding = (Grounding("ref_det", 999),)
    tasks = {
        "markdown": Task(
            "<|grounding|>Convert the document to markdown.",
            "a page as Markdown, with its parts' places",
            layout=True,
        ),
        "ocr": Task("<|grounding|>OCR this image.", "texts in a picture, with their places"),
        "free_ocr": Task("Free OCR.", "the text of a page, without places"),
        "figure": Task("Parse the figure.", "what a chart or a formula says"),
        "describe": Task("Describe this image in detail.", "a description"),
        "locate": Task(
            "Locate <|ref|>{text}<|/ref|> in the image.", "boxes around what TEXT names"
        ),
    }
    reductions: ClassVar[tuple[int, int]]  # widths of SAM's last convolutions, where not stated

    @property
    def text_config(self) -> dict[str, Any]:
        text: dict[str, Any] = self.config.get("text_config") or self.config["language_config"]
        return text

    @property
    def sam(self) -> dict[str, Any]:
        """SAM's config in Transformers' keys."""
        vision = self.config["vision_config"]
        if "sam_config" in vision:
            return dict(vision["sam_config"])
        stated = vision["width"]["sam_vit_b"]
        sam = {ours: stated[theirs] for ours, theirs in SAM_KEYS.items() if theirs in stated}
        return {"image_size": vision.get("image_size", 1024), **sam}

    def tied(self) -> bool:
        """Whether the head is the embedding table."""
        return bool(self.config.get("tie_word_embeddings", False))

    def decoder(self) -> DecoderConfig:
        return deepseek_decoder(self.text_config, tied=self.tied(), latent=False)

    def sam_config(self) -> SamConfig:
        """SAM's shape."""
        sam = self.sam
        width, patch = sam.get("hidden_size", 768), sam.get("patch_size", 16)
        return SamConfig(
            hidden=width,
            layers=sam.get("num_hidden_layers", 12),
            heads=sam.get("num_attention_heads", 12),
            mlp_hidden=int(sam.get("mlp_dim") or width * sam.get("mlp_ratio", 4.0)),
            patch=patch,
            grid=sam.get("image_size", 1024) // patch,
            window=sam.get("window_size", 14),
            whole=frozenset(sam.get("global_attn_indexes", (2, 5, 8, 11))),
            neck=sam.get("output_channels", 256),
            reductions=tuple(sam.get("downsample_channels") or self.reductions),
        )

    def normalised(self, image: Image.Image) -> Tensor:
        """A picture's values around 0.  # (3, height, width)"""
        config = self.processor_config
        shades = config.get("image_mean", pixels.HALF), config.get("image_std", pixels.HALF)
        return pixels.normalised(image, *shades)

    def tiles(self, image: Image.Image, grid: tuple[int, int], side: int) -> Tensor:
        """The picture squeezed into a grid (columns, rows) of tiles, (tiles, 3, side, side)."""
        columns, rows = grid
        if not columns * rows:
            return torch.empty(0, 3, side, side)
        resample = self.processor_config.get("resample", 3)
        wide = pixels.resize(image, columns * side, rows * side, resample)
        cut = self.normalised(wide).view(3, rows, side, columns, side)
        return cut.permute(1, 3, 0, 2, 4).flatten(0, 1)
