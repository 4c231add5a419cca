"""dots.ocr and dots.mocr (arXiv:2512.02498): a tower for whole pages before a small Qwen2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from opsin.decoder.config import DecoderConfig
from opsin.families.base import Family, MediaInput
from opsin.families.llama_shape import llama_decoder
from opsin.families.qwen2_vl import Qwen2VL
from opsin.towers.vit import ViTConfig
from opsin.types import Grounding, Task

# What published configs may leave to the authors' code.
VISION_DEFAULTS = {
    "embed_dim": 1536,
    "hidden_size": 1536,
    "intermediate_size": 4224,
    "num_hidden_layers": 42,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "rms_norm_eps": 1e-5,
    "use_bias": False,
    "post_norm": True,
}
CATEGORIES = (
    "['Caption', 'Footnote', 'Formula', 'List-item', 'Page-footer', 'Page-header', 'Picture', "
    "'Section-header', 'Table', 'Text', 'Title']"
)
LAYOUT = f"""\
Please output the layout information from the PDF image, including each layout element's bbox, \
its category, and the corresponding text content within the bbox.

1. Bbox format: [x1, y1, x2, y2]

2. Layout Categories: The possible categories are {CATEGORIES}.

3. Text Extraction & Formatting Rules:
    - Picture: For the 'Picture' category, the text field should be omitted.
    - Formula: Format its text as LaTeX.
    - Table: Format its text as HTML.
    - All Others (Text, Title, etc.): Format their text as Markdown.

4. Constraints:
    - The output text must be the original text from the image, with no translation.
    - All layout elements must be sorted according to human reading order.

5. Final Output: The entire output must be a single JSON object.
"""
REGIONS = (
    "Please output the layout information from this PDF image, including each layout's bbox and "
    "its category. The bbox should be in the format [x1, y1, x2, y2]. The layout categories for "
    f"the PDF document include {CATEGORIES}. Do not output the corresponding text. The layout "
    "result should be in JSON format."
)
IN_BOX = (
    "Extract text from the given bounding box on the image (format: [x1, y1, x2, y2]).\n"
    "Bounding Box:\n{text}"
)


class DotsOCR(Qwen2VL):
    """The tower is of Qwen2-VL's shape with RMS norms and gated MLPs; positions are plain."""

    modalities = ("image",)
    message_format = "list_with_image_first"
    placeholders = {"image": "<|imgpad|>"}
    processor_options = ("min_pixels", "max_pixels")
    image_pixels = (3136, 11289600)
    merger_norm = "layer"
    grounding = (Grounding("json_layout"),)
    tasks = {
        "layout": Task(LAYOUT, "a page's parts with their texts", layout=True),
        "regions": Task(REGIONS, "a page's parts without their texts", layout=True),
        "ocr": Task("Extract the text content from this image.", "the text of a picture"),
        "region": Task(IN_BOX, "the text inside the box TEXT, [x1, y1, x2, y2]"),
        "web": Task(
            "Parsing the layout info of this webpage image with format json:\n",
            "a web page's parts",
            layout=True,
        ),
        "scene": Task("Detect and recognize the text in the image.", "text in a photograph"),
    }
    rename = (
        (r"^language_model\.model\.lm_head\.", "lm_head."),
        (r"^vision_tower\.", "visual."),
        (r"^(visual\.patch_embed)\.patchifier\.proj\.", r"\1.proj."),
        (r"^visual\.patch_embed\.patchifier\.norm\.", "visual.pre_norm."),
        (r"^visual\.post_trunk_norm\.", "visual.post_norm."),
        (r"^(visual\.blocks\.\d+)\.mlp\.fc1\.(\w+)$", r"\1.mlp.up.\2[0]"),
        (r"^(visual\.blocks\.\d+)\.mlp\.fc3\.(\w+)$", r"\1.mlp.up.\2[1]"),
        (r"^(visual\.blocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.down."),
        (r"^visual\.blocks\.(\d+)\.mlp\.", r"towers.vision.layers.\1.mlp."),
        *Qwen2VL.rename,
    )

    @property
    def vision(self) -> dict[str, Any]:
        return {**VISION_DEFAULTS, **super().vision}

    def decoder(self) -> DecoderConfig:
        return llama_decoder(self.text_config, tied=self.tied(), qkv_bias=True, out_bias=False)

    def vit_config(self) -> ViTConfig:
        vision = self.vision
        bias = bool(vision["use_bias"])
        return ViTConfig(
            patch_dim=self.patch_dim(),
            hidden=vision["embed_dim"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_hidden=vision["intermediate_size"],
            activation="silu",
            norm="rms",
            norm_eps=vision["rms_norm_eps"],
            gated_mlp=True,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bias,
            pre_norm=True,
            post_norm=bool(vision["post_norm"]),
        )

    def patch_dim(self) -> int:
        vision = self.vision
        return int(vision["num_channels"] * vision["patch_size"] ** 2)

    def positions(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> tuple[Tensor, int]:
        return Family.positions(self, token_ids, media)


FAMILY = DotsOCR
