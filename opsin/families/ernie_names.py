"""The weights of ERNIE 4.5 VL by name: experts of two kinds, and the resampler."""

from __future__ import annotations

import re

from opsin.checkpoint.weights import Rename

EXPERT_PARTS = {"gate": ("gate_up", 0), "up": ("gate_up", 1), "down": ("down", 0)}


def resampler_names(experts: int) -> tuple[Rename, ...]:
    """Rules for what Qwen2-VL does not have; of each kind there are `experts`."""

    def placed(match: re.Match[str]) -> str:
        """The second half of the experts are those of pictures."""
        group, expert = divmod(int(match[1]), experts)
        name, part = EXPERT_PARTS[match[2]]
        return f".mlp.groups.{group}.{name}.weight[{part},{expert}]"

    return (
        (r"\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight$", placed),
        (r"\.mlp\.gate\.weight$", ".mlp.groups.0.router.weight^T"),
        (r"\.mlp\.gate\.weight_1$", ".mlp.groups.1.router.weight^T"),
        (r"\.mlp\.moe_statics\.e_score_correction_bias$", ".mlp.selection_bias"),
        (r"^(model\.)?resampler_model\.", "towers."),
        (r"^towers\.(spatial|temporal)_linear\.(0|fc1)\.", r"towers.\1.up."),
        (r"^towers\.(spatial|temporal)_linear\.(2|fc2)\.", r"towers.\1.down."),
        (r"^towers\.(spatial|temporal)_linear\.(3|ln)\.", r"towers.\1_norm."),
        (r"^towers\.mlp\.", "towers.projector."),
        (r"^(model\.)?vision_model\.ln\.", "visual.post_norm."),
        (r"^(model\.)?vision_model\.", "visual."),
        (r"^visual\.post_norm\.", "towers.vision.post_norm."),
    )
