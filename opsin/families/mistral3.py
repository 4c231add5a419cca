"""Mistral Small 3.1 and later: Pixtral's tower, with patches merged four to a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from opsin.families import bundled_template
from opsin.families.base import Encoded, MediaInput
from opsin.families.pixtral import Pixtral
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.nn.norm import RMSNorm


class Mistral3(Pixtral):
    """Adds a norm and a merging layer before the projector."""

    message_format = "list_with_image_first"
    default_template = bundled_template("mistral_small_3_2_tool_call")
    tied_default = True
    rename = (
        (r"^(model\.)?multi_modal_projector\.norm\.", "towers.norm."),
        (r"^(model\.)?multi_modal_projector\.patch_merger\.merging_layer\.", "towers.merger."),
        *Pixtral.rename,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        config = {"vision_feature_layer": -1, "multimodal_projector_bias": False, **config}
        super().__init__(config, processor_config)

    @property
    def merge(self) -> int:
        """Patches per side of the square that becomes one token."""
        return int(self.config.get("spatial_merge_size", 2))

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        towers = super().towers(kernels)
        hidden = self.vit_config().hidden
        towers["norm"] = RMSNorm(kernels, hidden, self.decoder().norm_eps)
        towers["merger"] = Linear(kernels, hidden * self.merge**2, hidden)
        return towers

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        normed = towers["norm"](self.features(towers, items))
        # The merging layer's weights expect the patches of a block inside each feature.
        blocks = normed.unflatten(0, (-1, self.merge**2)).transpose(1, 2).flatten(1)
        embeds = towers["projector"](towers["merger"](blocks))
        return [Encoded(part) for part in embeds.split([item.num_tokens for item in items])]


FAMILY = Mistral3
