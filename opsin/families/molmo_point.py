"""MolmoPoint: Molmo's crops upon Qwen 3's blocks, and points chosen among a picture's patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.checkpoint.safetensors import StoredTensor
from opsin.decoder.config import DecoderConfig
from opsin.decoder.decoder import Decoder
from opsin.errors import CheckpointError, InputError
from opsin.families.base import Encoded, Family, MediaInput, Prompt
from opsin.families.molmo_point_shape import RENAME, TOWER, decoder_of, pooled, tower_of
from opsin.families.molmo_point_speaking import PointSpeaker, PointWords
from opsin.families.molmo_shape import (
    crop_patches,
    grid_of,
    halves,
    layers_named,
    left_out,
    rows_of,
    tensor_of,
)
from opsin.families.options import MAX_TILES, whole_option
from opsin.families.speaking import Speaker
from opsin.kernels import Kernels
from opsin.towers import overlapping
from opsin.towers.pointing import PointHead
from opsin.towers.projectors import GatedProjector
from opsin.towers.vit import VisionLayout, VisionTransformer, vision_of
from opsin.towers.window_pooling import WindowPooling
from opsin.types import Grounding, Task

IMAGE, BEGIN = "<|image|>", "<|im_end|>"


class MolmoPoint(Family):
    """Pictures, all of which see each other; points come as `<POINT_p><POINT_s><POINT_l> id`."""

    message_format = "list_with_image_first"
    placeholders = {"image": IMAGE}
    media_tokens = {"image": "<im_patch>"}
    tokenizer_frame = False
    processor_options = ("max_crops",)
    grounding = (Grounding("patch_points"),)
    rename = RENAME
    tasks = {"point": Task("Point to {text}.", "a point on each TEXT")}

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.vit, self.connector = config["vit_config"], config["adapter_config"]
        self.words, self.more = self.text_config["vocab_size"], 128
        self.more = self.text_config.get("additional_vocab_size", self.more)
        self.taps = layers_named(self.connector["vit_layers"], self.vit["num_hidden_layers"])
        self.rows = torch.empty(0)
        stated = config.get("patch_location"), config.get("no_more_points_class")
        if stated != ("3x3", True) or config.get("token_prediction_rotary") != "one_d":
            raise CheckpointError(
                "The checkpoint points in a way that Opsin does not build",
                why="its patches have no places of 3x3, no end, or no one-dimensional order",
                remedy="Use the checkpoint that the model's authors published",
            )
        self.ignored = (
            left_out(max(self.taps) + 1, self.vit["num_hidden_layers"], TOWER + r"transformer\."),
        )

    def apart(self, tensor: StoredTensor) -> Sequence[StoredTensor]:
        return halves(tensor)

    def decoder(self) -> DecoderConfig:
        return decoder_of(self.text_config, (self.words, self.more))

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vit, adapter, hidden = self.vit, self.connector, self.text_config["hidden_size"]
        both, wide = vit["hidden_size"] * len(self.taps), adapter["hidden_size"]
        tower = tower_of(vit, max(self.taps) + 1)
        points = PointHead(
            kernels,
            hidden,
            both,
            self.config["patch_embed_dim"],
            theta=float(self.config["token_prediction_rotary_theta"]),
            eps=self.text_config["layer_norm_eps"],
        )
        heads, inner = adapter["num_attention_heads"], adapter["intermediate_size"]
        parts = {
            "vision": VisionTransformer(kernels, tower),
            "pooling": WindowPooling(kernels, both, wide, heads, out=False),
            "projector": GatedProjector(kernels, wide, inner, hidden),
            "points": points,
        }
        return nn.ModuleDict(parts)

    def connect(self, decoder: Decoder, towers: nn.ModuleDict) -> None:
        """Points are embedded by the words for them."""
        del towers
        names = ("patch_token_id", "location_token_id")
        ids = torch.tensor(
            [self.config[name] for name in names], device=decoder.embedding.weight.device
        )
        self.rows = decoder.embed(ids)

    # What goes in.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        """The whole picture, and larger in crops; which patches are pooled to one."""
        settings = self.processor_config
        side, patch = settings["size"]["height"], settings["patch_size"]
        left, right = settings["overlap_margins"]
        most = whole_option(options, "max_crops", settings["max_crops"], high=MAX_TILES)
        border, across = (left + right) * patch, side // patch
        step = side - border
        grid = grid_of(image.height - border, image.width - border, step, most)
        shape = grid[0] * step + border, grid[1] * step + border
        levels = tensor_of(image)
        whole, large = self._squeezed(levels, (side, side)), self._squeezed(levels, shape)
        crops = (
            crop_patches(whole, (1, 1), side, side, patch),
            crop_patches(large, grid, side, step, patch),
        )
        index = torch.arange((1 + len(crops[1])) * across**2).view(-1, across, across, 1)
        fine = overlapping.stitched(index[1:], grid, (left, right))[..., 0]
        windows = [pooled(part, *settings["pooling_size"]) for part in (index[0, ..., 0], fine)]
        (low, columns), (rows, wide) = (part.shape[:2] for part in windows)
        pooling = torch.cat([part.flatten(0, 1) for part in windows])
        small = rows_of("<im_low>", columns, low, "")
        end = rows_of("<im_patch>", wide, rows, "<im_col>")
        pointing = {
            "token_pooling": pooling.numpy(),
            "subpatch_mapping": [fine.numpy()],
            "image_sizes": [image.size],
        }
        return MediaInput(
            kind="image",
            features={"pixel_values": torch.cat(crops), "pooling": pooling},
            text=f"<low_res_im_start>{small}<im_end><im_start>{end}<im_end>",
            num_tokens=len(pooling),
            size=image.size,
            processed_size=shape[::-1],
            details={"pointing": pointing},
        )

    def _squeezed(self, levels: Tensor, shape: tuple[int, int]) -> Tensor:
        """Levels (3, h, w) at another size, without smoothing and rounded, then normalised."""
        if levels.shape[1:] != shape:
            levels = F.interpolate(levels[None], shape, mode="bilinear")[0].round()
        mean, std = (
            torch.tensor(self.processor_config[name])[:, None, None]
            for name in ("image_mean", "image_std")
        )
        return (levels / 255 - mean) / std

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """Every prompt begins with a token of its own."""
        text = super().expand(text, media)
        return text if text.startswith(BEGIN) else BEGIN + text

    def _patch_ids(self) -> Tensor:
        """The tokens of patches: of the crops, and of the whole."""
        names = ("image_patch_id", "image_non_indexable_patch_id")
        return torch.tensor([self.config[name] for name in names])

    def locate(
        self, token_ids: Sequence[int], media: Sequence[MediaInput], ids: Mapping[str, int]
    ) -> None:
        """Patches of the whole and of the crops have different tokens."""
        found = torch.isin(torch.tensor(token_ids), self._patch_ids()).nonzero()[:, 0]
        if len(found) != sum(item.num_tokens for item in media):
            raise InputError(
                "The text holds tokens that stand for patches of a picture",
                remedy="Leave them out of the text",
                param="prompt",
            )
        counts = [item.num_tokens for item in media]
        for item, indices in zip(media, found.split(counts), strict=True):
            item.indices = indices

    def atomic_spans(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> list[tuple[int, int]]:
        """From the first picture to the last, with what frames them."""
        runs = [framed(item) for item in media]
        return [(runs[0][0], runs[-1][1])] if runs else []

    def sees_ahead(self, token_ids: Sequence[int], media: Sequence[MediaInput]) -> Tensor | None:
        """The pictures' tokens: what is written between pictures sees those before it."""
        if len(media) < 2:
            return None
        ahead = torch.zeros(len(token_ids), dtype=torch.bool)
        for first, end in map(framed, media):
            ahead[first:end] = True
        return ahead

    # What the towers do.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        return [self._encoded(towers, item) for item in items]

    def _encoded(self, towers: nn.ModuleDict, item: MediaInput) -> Encoded:
        tower = vision_of(towers)
        table = tower.positions.weight
        crops = item.features["pixel_values"].to(table)
        count, length = crops.shape[:2]
        layout = VisionLayout([length] * count, position_embeds=table.repeat(count, 1))
        features = torch.cat(tower(crops.flatten(0, 1), layout, self.taps)[1], dim=-1)
        pooling = item.features["pooling"].to(table.device)
        there = pooling >= 0
        parts = features[pooling.clamp(min=0)] * there[..., None]
        hide = bool(self.connector.get("pooling_attention_mask"))
        embeds = towers["projector"](towers["pooling"](parts, there, hide=hide))
        return Encoded(embeds, adds=True, kept=(parts,))

    # What comes out.

    def speaker(self, prompt: Prompt, towers: nn.ModuleDict) -> Speaker | None:
        """Points, where there is a picture to point at."""
        if not prompt.media:
            return None
        config = self.config
        asked = ("always", "inference")
        words = PointWords(
            self.words + self.more,
            config["patch_token_id"],
            config["subpatch_token_id"],
            config["location_token_id"],
            sorted_patches=config.get("mask_patches") in asked,
            sorted_parts=config.get("mask_subpatches") in asked,
            once=config.get("mask_repeats") in ("all", "inference"),
        )
        places = torch.cat([item.indices for item in prompt.media])
        indexable = torch.tensor(prompt.token_ids)[places] == config["image_patch_id"]
        head = towers["points"]
        assert isinstance(head, PointHead)
        pooling = [item.features["pooling"] for item in prompt.media]
        return PointSpeaker(head, words, self.rows, places, indexable, pooling)


def framed(item: MediaInput) -> tuple[int, int]:
    """The run of a picture's tokens, with the token before its patches and the two after them."""
    return int(item.indices[0]) - 1, int(item.indices[-1]) + 3


FAMILY = MolmoPoint
