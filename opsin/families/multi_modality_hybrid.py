"""The larger DeepSeek-VL as its authors publish it."""

from __future__ import annotations

from typing import Any

from opsin.families.deepseek_vl import mean_colour
from opsin.families.deepseek_vl_hybrid import DeepseekVLHybrid
from opsin.families.multi_modality import POOLING, TIMM_RENAME, tower_shape
from opsin.towers import pixels

SAM = r"^vision_model\.vision_tower_high\.vision_tower\."


class MultiModalityHybrid(DeepseekVLHybrid):
    """The authors' names; pictures are normalised by what the towers' configs say."""

    rename = (
        (SAM + r"neck_hd\.0\.", "towers.detail.neck."),
        (SAM + r"neck_hd\.1\.", "towers.detail.neck_norm."),
        (SAM + r"neck_hd\.2\.", "towers.detail.mix."),
        (SAM + r"neck_hd\.3\.", "towers.detail.mix_norm."),
        (SAM + r"downsamples\.", "towers.detail.reductions."),
        (SAM + r"hd_alpha_downsamples$", "towers.detail.early_scale"),
        (SAM, "towers.sam."),
        (r"^vision_model\.vision_tower_low\.vision_tower\.", "towers.vision."),
        (r"^aligner\.high_up_proj\.", "towers.projector.first."),
        (r"^aligner\.low_up_proj\.", "towers.projector.second."),
        (r"^aligner\.layers\.1\.", "towers.projector.out."),
        *TIMM_RENAME,
        *DeepseekVLHybrid.rename,
    )
    ignored = (POOLING, r"^vision_model\.(high|low)_layer_norm\.")

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        towers = self.require(config, "vision_config")["params"]
        self.low, high = towers["low_res_cfg"], towers["high_res_cfg"]
        shades = {
            "resample": 2,
            "image_mean": self.low.get("pixel_mean", pixels.HALF),
            "image_std": self.low.get("pixel_std", pixels.HALF),
            "high_res_image_mean": high.get("pixel_mean", pixels.CLIP_MEAN),
            "high_res_image_std": high.get("pixel_std", pixels.CLIP_STD),
            "do_normalize": True,
        }
        sharp = {name: value for name, value in high.items() if name != "model_name"}
        config = {**config, "high_res_vision_config": sharp}
        super().__init__(config, {**processor_config, **shades})
        self.sharp_colour = mean_colour(processor_config.get("image_mean"))

    @property
    def text_config(self) -> dict[str, Any]:
        return {"model_type": "llama", **self.require(self.config, "language_config")}

    def vision_config(self) -> dict[str, Any]:
        return {**tower_shape(self.low), "image_size": self.low.get("image_size", 384)}


FAMILY = MultiModalityHybrid
