"""Moondream 3 (preview): one picture in overlapping crops, and four things to do with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from opsin.checkpoint.safetensors import StoredTensor
from opsin.decoder.config import DecoderConfig
from opsin.errors import InputError
from opsin.families.base import Encoded, Family, MediaInput, Prompt, features_of
from opsin.families.moondream3_places import PlaceSpeaker, PlaceTokens
from opsin.families.moondream3_shape import (
    EPS,
    EXPERTS,
    REGION,
    RENAME,
    TEMPLATES,
    TEXT,
    VISION,
    decoder_of,
    dense_rename,
    tower_of,
)
from opsin.families.options import MAX_TILES, whole_option
from opsin.families.speaking import Speaker
from opsin.kernels import Kernels
from opsin.towers import overlapping, pixels
from opsin.towers.places import PlaceHead
from opsin.towers.projectors import MLPProjector
from opsin.towers.vit import VisionLayout, VisionTransformer, vision_of
from opsin.types import Grounding, Task

IMAGE = "<image>"
# The tokens 1, 2 and 3: before what is to be done, before what it is done with, and at the end.
FIRST, THEN, LAST = "<|md_reserved_0|>", "<|md_reserved_1|>", "<|md_reserved_2|>"
OBJECTS = (Grounding("json_objects", 1),)


class Moondream3(Family):
    """A question, a caption, or places, of one picture at most."""

    message_format = "prompt_only"
    one_picture = True
    placeholders = {"image": IMAGE}
    # A picture's tokens have no id of their own; no template uses this one.
    media_tokens = {"image": "<|md_reserved_7|>"}
    bare_prompt = True
    tokenizer_frame = False
    processor_options = ("max_crops",)
    tasks = {
        "query": Task(f"{FIRST}query{THEN}{{text}}{LAST}", "an answer to the question TEXT"),
        "caption": Task(f"{FIRST}caption{THEN}normal{LAST}", "a caption"),
        "short_caption": Task(f"{FIRST}caption{THEN}short{LAST}", "a short caption"),
        "long_caption": Task(f"{FIRST}caption{THEN}long{LAST}", "a long caption"),
        "detect": Task(f"{FIRST}detect{THEN} {{text}}{LAST}", "boxes around each TEXT", OBJECTS),
        "point": Task(f"{FIRST}point{THEN} {{text}}{LAST}", "a point on each TEXT", OBJECTS),
    }

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        given = config.get("config") or {}
        self.text = TEXT | dict(given.get("text") or {})
        self.moe = EXPERTS | dict(self.text.get("moe") or {})
        self.vision = VISION | dict(given.get("vision") or {})
        self.region = REGION | dict(given.get("region") or {})
        tokens = dict(given.get("tokenizer") or {})
        self.bos, self.eos = tokens.get("bos_id", 0), tokens.get("eos_id", 0)
        self.templates = tokens.get("templates") or TEMPLATES
        self.name_of: Callable[[int], str | None] = str
        self.has_region = self.region_has_norm = True
        self.side = self.vision["crop_size"] // self.vision["enc_patch_size"]
        self.own = PlaceTokens(
            self.text["vocab_size"], self.region["coord_out_dim"], self.region["size_out_dim"] // 2
        )
        self.rename = (*dense_rename(self.moe["start_layer"]), *RENAME)

    def inspect(self, tensors: Sequence[StoredTensor]) -> None:
        """MLX's conversions have no region head, and not every head has a norm."""
        names = [tensor.name for tensor in tensors if "region." in tensor.name]
        self.has_region = bool(names)
        self.region_has_norm = any("region.ln." in name for name in names)

    def decoder(self) -> DecoderConfig:
        return decoder_of(self.text, self.moe)

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        vision, region = self.vision, self.region
        tower = tower_of(vision)
        projector = MLPProjector(
            kernels,
            2 * vision["enc_dim"],
            vision["proj_inner_dim"],
            vision["proj_out_dim"],
            activation="gelu_tanh",
        )
        towers = nn.ModuleDict(
            {"vision": VisionTransformer(kernels, tower), "projector": projector}
        )
        if self.has_region:
            towers["region"] = PlaceHead(
                kernels,
                self.text["dim"],
                features=(region["coord_feat_dim"], region["size_feat_dim"]),
                bins=(self.own.coordinates, self.own.sizes),
                eps=EPS if self.region_has_norm else None,
            )
        return towers

    # What goes in.

    def name_tokens(self, name_of: Callable[[int], str | None]) -> None:
        """The words of templates are told by their tokens' names."""
        self.name_of = name_of

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        """The picture whole, and larger in crops that overlap (Lanczos, as without libvips)."""
        vision, side = self.vision, self.vision["crop_size"]
        most = whole_option(options, "max_crops", vision["max_crops"], high=MAX_TILES)
        margin = 2 * vision["overlap_margin"] * vision["enc_patch_size"]
        step = side - margin
        grid = overlapping.grid_for(image.height - margin, image.width - margin, step, most)
        shape = grid[1] * step + margin, grid[0] * step + margin
        whole, large = (
            pixels.normalised(
                pixels.resize(image, *size, Image.Resampling.LANCZOS), pixels.HALF, pixels.HALF
            )
            for size in ((side, side), shape)
        )
        crops = torch.cat((whole[None], overlapping.cut(large, grid, side, step)))
        return MediaInput(
            kind="image",
            features={"pixel_values": crops},
            text="",
            num_tokens=self.side**2,
            size=image.size,
            processed_size=shape,
            details={"grid": grid},
        )

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        missing = max(len(media) - text.count(IMAGE), 0)
        return super().expand(IMAGE * missing + text, media)

    def with_media(
        self, token_ids: list[int], media: Sequence[MediaInput], ids: Mapping[str, int]
    ) -> list[int]:
        """The start, the picture, and what to do: the task that the tokens name, or a question."""
        task, words = self._named(token_ids)
        if task != "query" and not media:
            raise InputError(f"The task {task} needs a picture", param="image")
        template = self.templates[task]
        if task == "caption":
            asked = template["".join(map(str, map(self.name_of, words)))]
        else:
            asked = [*template["prefix"], *words, *template["suffix"]]
        return [self.bos, *[ids["image"]] * sum(item.num_tokens for item in media), *asked]

    def _named(self, token_ids: list[int]) -> tuple[str, list[int]]:
        """The task that a prompt's tokens name, and the tokens that it is given."""
        first, *_, then = self.templates["query"]["prefix"]
        (last,) = self.templates["query"]["suffix"]
        if token_ids[:1] == [first] and token_ids[-1] == last and then in token_ids:
            middle = token_ids.index(then)
            task = "".join(map(str, map(self.name_of, token_ids[1:middle])))
            if task in self.templates:
                return task, token_ids[middle + 1 : -1]
        return "query", token_ids

    def atomic_spans(
        self, token_ids: Sequence[int], media: Sequence[MediaInput]
    ) -> list[tuple[int, int]]:
        """The start and the picture see each other."""
        return [(0, min(self.text["prefix_attn"], len(token_ids)))] if media else []

    # What the towers do.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        tower, count = vision_of(towers), self.side**2
        margins = (self.vision["overlap_margin"],) * 2
        crops = features_of(items, "pixel_values")
        table = tower.positions.weight
        layout = VisionLayout([count] * len(crops), position_embeds=table.repeat(len(crops), 1))
        patches = pixels.patchify(crops.to(table.device), self.vision["enc_patch_size"])
        features = tower(patches, layout)[0].unflatten(0, (-1, self.side, self.side))
        encoded = []
        for own, item in zip(
            features.split([len(item.features["pixel_values"]) for item in items]),
            items,
            strict=True,
        ):
            large = overlapping.stitched(own[1:], item.details["grid"], margins)
            pooled = F.adaptive_avg_pool2d(large.permute(2, 0, 1)[None], self.side)[0].flatten(1)
            both = torch.cat((own[0].flatten(0, 1), pooled.T), dim=-1)
            encoded.append(Encoded(towers["projector"](both)))
        return encoded

    # What comes out.

    def speaker(self, prompt: Prompt, towers: nn.ModuleDict) -> Speaker | None:
        """Places, where a task asks for them."""
        asked = prompt.token_ids[1 + sum(item.num_tokens for item in prompt.media) :]
        for task in ("detect", "point"):
            prefix = self.templates[task]["prefix"]
            if asked[: len(prefix)] == prefix:
                return self._pointing(towers, boxes=task == "detect")
        return None

    def _pointing(self, towers: nn.ModuleDict, *, boxes: bool) -> Speaker:
        if not self.has_region:
            raise InputError(
                "This checkpoint cannot detect or point",
                why="it was made without the region head",
                remedy="Use the checkpoint that the model's authors published",
                param="task",
            )
        head = towers["region"]
        assert isinstance(head, PlaceHead)
        return PlaceSpeaker(head, self.own, self.eos, boxes=boxes)

    def written(self, token_ids: Sequence[int]) -> str | None:
        return self.own.written(token_ids) if max(token_ids, default=0) >= self.own.first else None


FAMILY = Moondream3
