"""Llama 4: a mixture of experts, attention in chunks, layers without rope, tiles and the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.decoder.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
)
from opsin.families.base import Encoded, Family, MediaInput, features_of
from opsin.families.clip_shape import one_side
from opsin.families.llama_shape import ACTIVATIONS, LLAMA_RENAME, llama_decoder
from opsin.families.options import MAX_TILES, switch_option, whole_option
from opsin.kernels import Kernels
from opsin.nn.linear import Linear
from opsin.towers import pixels
from opsin.towers.canvas import best_canvas, by_proportion, fitted_size, size_on_canvas
from opsin.towers.projectors import MLPProjector
from opsin.towers.vit import (
    VisionLayout,
    VisionTransformer,
    ViTConfig,
    axial_angles,
    grid_coordinates,
    vision_of,
)

MERGE = 2
SPLIT = "<|tile_x_separator|>"
END_OF_ROW = "<|tile_y_separator|>"


class Llama4(Family):
    """The tower's patches are merged two by two; every tile gives the same number of tokens."""

    message_format = "list_with_image"
    placeholders = {"image": "<|image|>"}
    media_tokens = {"image": "<|patch|>"}
    processor_options = ("max_patches", "resize_to_max_canvas")
    rename = (
        (r"\.feed_forward\.", ".mlp."),
        (r"\.mlp\.router\.weight$", ".mlp.router.weight"),
        (r"\.mlp\.experts\.(gate_up|down)_proj$", r".mlp.\1.weight^T"),
        (r"\.mlp\.experts\.(gate_up|down)_proj\.weight$", r".mlp.\1.weight"),
        (r"\.mlp\.shared_expert\.gate_proj\.weight$", ".mlp.shared.gate_up.weight[0]"),
        (r"\.mlp\.shared_expert\.up_proj\.weight$", ".mlp.shared.gate_up.weight[1]"),
        (r"\.mlp\.shared_expert\.down_proj\.", ".mlp.shared.down."),
        (r"^vision_model\.class_embedding$", "towers.vision.class_token"),
        (r"^vision_model\.positional_embedding_vlm$", "towers.vision.positions.weight"),
        (r"^vision_model\.patch_embedding\.linear\.", "towers.vision.patch."),
        (r"^vision_model\.layernorm_pre\.", "towers.vision.pre_norm."),
        (r"^vision_model\.layernorm_post\.", "towers.vision.post_norm."),
        (r"^vision_model\.vision_adapter\.mlp\.fc1\.", "towers.adapter.up."),
        (r"^vision_model\.vision_adapter\.mlp\.fc2\.", "towers.adapter.down."),
        (r"^multi_modal_projector\.linear_1\.", "towers.projector."),
        (r"^vision_model\.model\.layers\.", "towers.vision.layers."),
        (r"^(towers\.vision\.layers\.\d+)\.mlp\.fc1\.", r"\1.mlp.up."),
        (r"^(towers\.vision\.layers\.\d+)\.mlp\.fc2\.", r"\1.mlp.down."),
        *LLAMA_RENAME,
        (r"^(towers\..*)\.input_layernorm\.", r"\1.attention_norm."),
    )

    # The decoder.

    def decoder(self) -> DecoderConfig:
        text = self.text_config
        dense = {**text, "intermediate_size": text.get("intermediate_size_mlp", 16384)}
        plain = llama_decoder(dense, tied=False)
        count = text["num_hidden_layers"]
        interval = text.get("no_rope_layer_interval", 4)
        roped = text.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
        kinds = text.get("layer_types")
        chunked = [bool(rope) for rope in roped]
        if kinds:
            chunked = [kind == "chunked_attention" for kind in kinds]
        step = text.get("interleave_moe_layer_step", 1)
        sparse = text.get("moe_layers")
        sparse = range(step - 1, count, step) if sparse is None else sparse
        layers = tuple(
            LayerConfig(
                self.attention(layer, bool(rope), chunks),
                self.experts() if i in sparse else layer.mlp,
            )
            for i, (layer, rope, chunks) in enumerate(
                zip(plain.layers, roped, chunked, strict=False)
            )
        )
        return dataclasses.replace(plain, layers=layers, norm_eps=text.get("rms_norm_eps", 1e-5))

    def attention(self, plain: LayerConfig, roped: bool, chunked: bool) -> AttentionConfig:
        """The attention of a layer with rope or without."""
        text, attention = self.text_config, plain.attention
        assert isinstance(attention, AttentionConfig)
        assert attention.rope is not None
        chunk = text.get("attention_chunk_size", 8192) if chunked else None
        if not roped:
            every, weight = text.get("floor_scale", 8192), text.get("attn_scale", 0.1)
            tuned = text.get("attn_temperature_tuning", True)
            temperature = (float(every), float(weight), 1.0) if tuned else None
            return dataclasses.replace(attention, rope=None, chunk=chunk, temperature=temperature)
        return dataclasses.replace(
            attention,
            rope=dataclasses.replace(attention.rope, pairs="adjacent"),
            qk_norm="rms_plain" if text.get("use_qk_norm", True) else None,
            qk_norm_last=True,
            chunk=chunk,
        )

    def experts(self) -> MoEConfig:
        """The sparse layers' feed-forward block."""
        text = self.text_config
        activation = ACTIVATIONS[text.get("hidden_act", "silu")]
        return MoEConfig(
            experts=text.get("num_local_experts", 16),
            top_k=text.get("num_experts_per_tok", 1),
            hidden=text["intermediate_size"],
            activation=activation,
            router="sigmoid",
            normalise=False,
            weigh_input=True,
            shared=MLPConfig(text["intermediate_size"], activation),
        )

    # The tower.

    @property
    def grid(self) -> int:
        """Patches along the side of a tile."""
        vision = self.config["vision_config"]
        return one_side(vision["image_size"]) // one_side(vision["patch_size"])

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vision = self.config["vision_config"]
        hidden, inner = vision["hidden_size"], vision.get("projector_output_dim", 4096)
        vit = ViTConfig(
            patch_dim=3 * one_side(vision["patch_size"]) ** 2,
            hidden=hidden,
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_hidden=vision["intermediate_size"],
            norm_eps=1e-5,
            patch_bias=False,
            positions=self.grid**2 + 1,
            class_token=True,
            class_token_last=True,
            rope_pairs="adjacent",
            pre_norm=True,
            post_norm=True,
        )
        merged = hidden * MERGE**2
        between = vision.get("projector_input_dim", 4096)
        out = self.text_config["hidden_size"]
        return nn.ModuleDict(
            {
                "vision": VisionTransformer(kernels, vit),
                "adapter": MLPProjector(kernels, merged, between, inner, bias=False),
                "projector": Linear(kernels, vision.get("vision_output_dim", 7680), out),
            }
        )

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        tower = vision_of(towers)
        device, config = tower.patch.weight.device, tower.config
        vision = self.config["vision_config"]
        tiles = features_of(items, "pixel_values")
        patches = torch.cat(
            [pixels.patchify(tile, one_side(vision["patch_size"]), MERGE) for tile in tiles]
        )
        places = grid_coordinates(self.grid, self.grid, MERGE)
        rows = torch.cat((places @ torch.tensor([self.grid, 1]), torch.tensor([self.grid**2])))
        # Columns turn first; counting starts at one, and the class token does not turn.
        turns = torch.cat((places.flip(1) + 1, torch.zeros(1, 2, dtype=torch.long)))
        parameters = vision.get("rope_parameters") or vision
        theta = float(parameters.get("rope_theta", 10000.0))
        cos, sin = axial_angles(turns.to(device), config.hidden // config.heads, theta)
        layout = VisionLayout(
            [self.grid**2] * len(tiles),
            position_embeds=tower.positions.weight[rows.to(device)].repeat(len(tiles), 1),
            angles=(cos.repeat(len(tiles), 1), sin.repeat(len(tiles), 1)),
        )
        features, _ = tower(patches.to(tower.patch.weight), layout)
        kept = features.unflatten(0, (len(tiles), -1))[:, :-1].flatten(0, 1)
        projected = towers["projector"](F.gelu(towers["adapter"](kept)))
        return [Encoded(part) for part in projected.split([item.num_tokens for item in items])]

    # Pictures.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        config = self.processor_config
        side = int((config.get("size") or {"height": 336})["height"])
        most = whole_option(options, "max_patches", config.get("max_patches", 16), high=MAX_TILES)
        fill = switch_option(options, "resize_to_max_canvas", config.get("resize_to_max_canvas"))
        rows, columns = best_canvas(image.size, side, by_proportion(most), fill=fill)
        height, width = rows * side, columns * side
        canvas = (width, height)
        size = fitted_size(image.size, canvas) if fill else size_on_canvas(image.size, canvas, side)
        values = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)[None]
        fitted = resized(values, size)
        spare = (0, width - fitted.shape[3], 0, height - fitted.shape[2])
        tiles = F.pad(fitted, spare).view(3, rows, side, columns, side)
        tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)
        if rows * columns > 1:
            tiles = torch.cat((tiles, resized(values, (side, side))))
        each = (side // config.get("patch_size", 14)) ** 2 // MERGE**2
        return MediaInput(
            kind="image",
            features={"pixel_values": normalised(tiles, config)},
            text=self.layout_text(rows, columns, each),
            num_tokens=each * len(tiles),
            size=image.size,
            processed_size=(width, height),
        )

    def layout_text(self, rows: int, columns: int, each: int) -> str:
        """What stands for a picture of rows x columns tiles of `each` tokens, and the whole."""
        tile = self.media_token("image") * each
        row = SPLIT.join([tile] * columns) + END_OF_ROW
        parts = row * rows if rows * columns > 1 else ""
        return f"<|image_start|>{parts}{self.placeholders['image']}{tile}<|image_end|>"


def resized(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Bytes (1, channels, height, width) at (width, height), by torch's filter as the reference."""
    return F.interpolate(values, (size[1], size[0]), mode="bilinear", antialias=True)


def normalised(tiles: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Byte tiles as float32 values, rounded through bfloat16 as the reference rounds them."""
    values = tiles.to(torch.bfloat16) * config.get("rescale_factor", 1 / 255)
    mean, std = (
        torch.tensor(config.get(name, pixels.HALF), dtype=torch.bfloat16)[:, None, None]
        for name in ("image_mean", "image_std")
    )
    return ((values - mean) / std).float()


FAMILY = Llama4
