"""Florence-2 (arXiv:2311.06242): an encoder reads picture and task, a decoder writes the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn

from opsin.checkpoint.safetensors import StoredTensor
from opsin.decoder.config import DecoderConfig
from opsin.errors import CheckpointError, InputError
from opsin.families.bart_shape import (
    BART_DEFAULTS,
    BART_IGNORED,
    BART_RENAME,
    bart_decoder,
    bart_encoder,
)
from opsin.families.base import Encoded, Family, MediaInput, features_of
from opsin.families.florence2_tasks import NAMED, TOKENS, WORDS
from opsin.families.llama_shape import ACTIVATIONS
from opsin.kernels import Kernels
from opsin.towers import pixels
from opsin.towers.davit import DaViT, DaViTConfig, DaViTStage, GridProjector
from opsin.towers.text_encoder import TextEncoder
from opsin.types import Grounding

IMAGE = "<image>"
# What configs leave out, as the authors' own classes fill it in.
VISION_DEFAULTS: dict[str, Any] = {
    "activation_function": "gelu",
    "depths": (1, 1, 9, 1),
    "embed_dim": (128, 256, 512, 1024),
    "max_position_embeddings": 50,
    "max_temporal_embeddings": 100,
    "mlp_ratio": 4.0,
    "num_groups": (4, 8, 16, 32),
    "num_heads": (4, 8, 16, 32),
    "patch_padding": (3, 1, 1, 1),
    "patch_prenorm": (False, True, True, True),
    "patch_size": (7, 3, 3, 3),
    "patch_stride": (4, 2, 2, 2),
    "projection_dim": 1024,
    "qkv_bias": True,
    "window_size": 12,
}
SOURCES = ["spatial_avg_pool", "temporal_avg_pool"]


class Florence2(Family):
    """A task in words, with or without a picture; answers name places by a thousand bins."""

    message_format = "prompt_only"
    one_picture = True
    placeholders = {"image": IMAGE}
    bare_prompt = True
    tokenizer_frame = False
    grounding = (Grounding("loc_bins", 1000),)
    tasks = NAMED
    answer_tokens = TOKENS
    ignored: tuple[str, ...] = BART_IGNORED
    rename = (
        (
            r"^(model\.)?vision_tower\.convs\.(\d+)\.(proj|conv)\.",
            r"towers.vision.embeddings.\2.conv.",
        ),
        (r"^(model\.)?vision_tower\.convs\.", "towers.vision.embeddings."),
        (r"^(model\.)?vision_tower\.blocks\.", "towers.vision.stages."),
        (r"^(towers\.vision\..*)\.spatial_block\.", r"\1.0."),
        (r"^(towers\.vision\..*)\.channel_block\.", r"\1.1."),
        (r"^(towers\.vision\..*)\.conv1\.(fn\.dw\.)?", r"\1.attention_conv."),
        (r"^(towers\.vision\..*)\.conv2\.(fn\.dw\.)?", r"\1.mlp_conv."),
        (
            r"^(towers\.vision\..*)\.(window_attn\.norm|channel_attn\.norm|norm1)\.",
            r"\1.attention_norm.",
        ),
        (r"^(towers\.vision\..*)\.(ffn\.norm|norm2)\.", r"\1.mlp_norm."),
        (r"^(towers\.vision\..*)\.(window|channel)_attn\.(fn\.)?qkv\.", r"\1.attention.qkv."),
        (r"^(towers\.vision\..*)\.(window|channel)_attn\.(fn\.)?proj\.", r"\1.attention.out."),
        (r"^(towers\.vision\..*)\.ffn\.(fn\.net\.)?fc1\.", r"\1.mlp.up."),
        (r"^(towers\.vision\..*)\.ffn\.(fn\.net\.)?fc2\.", r"\1.mlp.down."),
        (r"^model\.multi_modal_projector\.", ""),
        (r"^image_projection$", "towers.projector.projection.weight^T"),
        (r"^image_projection\.", "towers.projector.projection."),
        (r"^image_proj_norm\.", "towers.projector.norm."),
        (r"^image_pos(ition)?_embed\.row_embeddings\.", "towers.projector.rows."),
        (r"^image_pos(ition)?_embed\.column_embeddings\.", "towers.projector.columns."),
        (r"^visual_temporal_embed\.pos_idx_to_embed$", "towers.projector.frames.weight"),
        *BART_RENAME,
    )

    def __init__(self, config: dict[str, Any], processor_config: dict[str, Any]) -> None:
        super().__init__(config, processor_config)
        self.text = BART_DEFAULTS | dict(self.text_config)
        self.require(self.text, "vocab_size")
        self.vision = self._vision(dict(config.get("vision_config") or {}))
        self.tied = bool(config.get("tie_word_embeddings", True))
        self.head_bias = False
        first, forced = self.text["decoder_start_token_id"], self.text.get("forced_bos_token_id", 0)
        self.decoder_start = (first,) if forced is None else (first, forced)
        if self.tied:
            self.ignored = (*BART_IGNORED, r"(^|\.)lm_head\.weight$")
        self.read_generation(self.text)

    def _vision(self, stated: dict[str, Any]) -> dict[str, Any]:
        """The tower's config in Transformers' keys, from those or the authors'."""
        if stated.get("image_feature_source", SOURCES) != SOURCES:
            raise CheckpointError(
                "The checkpoint's picture features are of a kind that Opsin does not build",
                why=f"image_feature_source is {stated['image_feature_source']}, not {SOURCES}",
                remedy="Choose a checkpoint of Florence-2 as it was published",
            )
        places = stated.get("image_pos_embed") or {}
        frames = stated.get("visual_temporal_embedding") or {}
        names = {
            "embed_dim": stated.get("dim_embed"),
            "max_position_embeddings": places.get("max_pos_embeddings"),
            "max_temporal_embeddings": frames.get("max_temporal_embeddings"),
        }
        named = {name: value for name, value in names.items() if value is not None}
        return VISION_DEFAULTS | named | stated

    def inspect(self, tensors: Sequence[StoredTensor]) -> None:
        """Only the authors' files hold a bias of the head."""
        self.head_bias = any(tensor.name.endswith("final_logits_bias") for tensor in tensors)

    def decoder(self) -> DecoderConfig:
        decoder = bart_decoder(self.text, tied=self.tied, head_bias=self.head_bias)
        image = self.media_token_id("image")
        outside = image >= decoder.vocab_size
        return dataclasses.replace(decoder, blank_ids=(image,) if outside else ())

    @property
    def tower(self) -> DaViTConfig:
        """The vision tower's shape."""
        vision = self.vision
        keys = ("embed_dim", "patch_size", "patch_stride", "patch_padding", "patch_prenorm")
        rows = zip(
            *(vision[key] for key in (*keys, "depths", "num_heads", "num_groups")), strict=True
        )
        return DaViTConfig(
            stages=tuple(DaViTStage(*row) for row in rows),
            window=vision["window_size"],
            mlp_ratio=vision["mlp_ratio"],
            qkv_bias=vision["qkv_bias"],
            activation=ACTIVATIONS[vision["activation_function"]],
        )

    def towers(self, kernels: Kernels) -> nn.ModuleDict:
        tower, vision = self.tower, self.vision
        return nn.ModuleDict(
            {
                "vision": DaViT(kernels, tower),
                "projector": GridProjector(
                    kernels,
                    tower.stages[-1].hidden,
                    vision["projection_dim"],
                    vision["max_position_embeddings"],
                    vision["max_temporal_embeddings"],
                ),
                "encoder": TextEncoder(kernels, bart_encoder(self.text)),
            }
        )

    # What goes in.

    def prepare_image(self, image: Image.Image, options: Mapping[str, Any]) -> MediaInput:
        del options
        framed = pixels.framed(image, self.processor_config)
        rows, columns = self.tower.grid(framed.height, framed.width)
        most = self.vision["max_position_embeddings"]
        if max(rows, columns) > most:
            raise CheckpointError(
                f"Pictures of {framed.width} x {framed.height} pixels are too large for the model",
                why=f"they give {columns} x {rows} places, and each side has {most} positions",
                remedy="Use the preprocessor_config.json that the model's authors published",
            )
        values = pixels.normalised(framed, *pixels.normalisation(self.processor_config))
        return MediaInput(
            kind="image",
            features={"pixel_values": values[None]},
            text="",
            num_tokens=rows * columns + 1,
            size=image.size,
            processed_size=framed.size,
        )

    def media_token_id(self, kind: str) -> int:
        """The id after the vocabulary, unless the config names one."""
        del kind
        return int(self.config.get("image_token_id", self.text["vocab_size"]))

    def expand(self, text: str, media: Sequence[MediaInput]) -> str:
        """The words of the task that a prompt names, framed where a picture comes before them."""
        missing = max(len(media) - text.count(IMAGE), 0)
        words = asked(super().expand(IMAGE * missing + text, media))
        return f"<s>{words}</s>" if media else words

    def with_media(
        self, token_ids: list[int], media: Sequence[MediaInput], ids: Mapping[str, int]
    ) -> list[int]:
        """The picture's tokens come first."""
        return [ids["image"]] * sum(item.num_tokens for item in media) + token_ids

    # What the towers do.

    def encode(self, towers: nn.ModuleDict, items: Sequence[MediaInput]) -> list[Encoded]:
        weight = towers.get_parameter("projector.projection.weight")
        batch = features_of(items, "pixel_values").to(weight)
        return [Encoded(embeds) for embeds in towers["projector"](towers["vision"](batch))]

    def encode_prompts(
        self, towers: nn.ModuleDict, embeds: Tensor, lengths: Sequence[int]
    ) -> Tensor:
        states: Tensor = towers["encoder"](embeds, lengths)
        return states


def asked(text: str) -> str:
    """A prompt with the token of a task, as `<OD>`, replaced by the task's words.

    Raises InputError where the task takes words and none came, or none and some did.
    """
    for token, words in WORDS.items():
        if token not in text:
            continue
        given = text.replace(token, "").strip()
        if bool(given) != ("{text}" in words):
            raise InputError(
                f"{token} {'takes no words beside it' if given else 'needs words after it'}",
                why=f"it stands for {words!r}",
                param="prompt",
            )
        return words.replace("{text}", given)
    return text


FAMILY = Florence2
