"""Phi-4-reasoning-vision, after Microsoft's modeling and processing files (`*_phi4_visionr.py`),
read beside vLLM's phi4siglip.py and TensorRT-LLM's port.

The authors subclass Transformers' Phi3ForCausalLM and hang its Siglip2VisionModel in, so this does
too. They write -200 for a picture and spread it over the embeddings; vLLM writes the tokenizer's
first unused token, `<|dummy_0|>`, once a patch, and so does this. mlx-vlm resizes the position
table with bicubic and lets real patches see the padding: the authors do neither.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM, Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

STAND_IN = "<|dummy_0|>"


class Tower(nn.Module):
    """The published names are `vision_tower.vision_tower.vision_model.*`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        vision = Siglip2VisionConfig(**{"patch_size": 16, **config["vision_config"]})
        vision._attn_implementation = "eager"
        self.vision_tower = nn.Module()
        self.vision_tower.vision_model = Siglip2VisionModel(vision)


class Phi4VisionR(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        known = {k: v for k, v in config.items() if k not in ("model_type", "vision_config")}
        text = Phi3Config(**known)
        text._attn_implementation = "eager"
        phi = Phi3ForCausalLM(text)
        self.model, self.lm_head = phi.model, phi.lm_head
        self.model.vision_tower = Tower(config)
        d = config["hidden_size"]
        self.model.mm_projector = nn.Sequential(
            nn.Linear(config["mm_hidden_size"], d), nn.GELU(), nn.Linear(d, d)
        )
        self.seen: tuple[Any, Any] = (None, None)  # the last pictures, and what they became

    def pictures(self, inputs: dict[str, Any]) -> torch.Tensor:
        mask = inputs["pixel_attention_mask"]
        tower = self.model.vision_tower.vision_tower.vision_model
        states = tower(
            pixel_values=inputs["padded"],
            pixel_attention_mask=mask,
            spatial_shapes=inputs["spatial_shapes"],
            output_hidden_states=True,
        ).hidden_states[-2]
        return self.model.mm_projector(states[mask.bool()])

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        ids = inputs["input_ids"]
        x = self.model.embed_tokens(ids)
        if "padded" in inputs:
            if self.seen[0] is not inputs["padded"]:
                self.seen = (inputs["padded"], self.pictures(inputs))
            x = x.clone()
            # One that the model writes itself is a word like others.
            places = (ids[0] == inputs["stand_in"]).nonzero().flatten()
            x[0, places[: len(self.seen[1])]] = self.seen[1]
        return self.lm_head(self.model(inputs_embeds=x, use_cache=False).last_hidden_state)[0]


def build(config: dict[str, Any]) -> nn.Module:
    return Phi4VisionR(config).eval()


class NoUpscale(Siglip2ImageProcessorPil):
    """The authors' processor: the picture's own patches, within the two limits."""

    def patches(self, image: Image.Image, low: int, high: int) -> Any:
        size = self.patch_size
        own = max((image.height // size) * (image.width // size), 1)
        target = get_image_size_for_max_num_patches(
            image.height, image.width, size, min(max(own, low), high)
        )
        resized = image.resize((target[1], target[0]), Image.Resampling.BILINEAR)
        return self(
            [resized], max_num_patches=high, do_resize=False, return_tensors="pt",
        )  # fmt: skip


def encode(
    folder: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    audio: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """`<image>` and a newline for each picture, and the text around them tokenised in pieces."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    flat = [
        {
            "role": message["role"],
            "content": "".join(
                "<image>\n" if part["type"] == "image" else part["text"]
                for part in message["content"]
            ),
        }
        for message in messages
    ]
    text = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    pieces = text.render(messages=flat, add_generation_prompt=True).split("<image>")
    stand_in = tokenizer.token_to_id(STAND_IN)
    processor = NoUpscale(patch_size=config["vision_config"].get("patch_size", 16))
    low = options.get("min_num_patches", config.get("min_num_patches", 256))
    high = options.get("max_num_patches", config.get("max_num_patches", 3600))
    made = [processor.patches(image.convert("RGB"), low, high) for image in images]
    ids = tokenizer.encode(pieces[0]).ids
    for piece, one in zip(pieces[1:], made, strict=True):
        ids += [stand_in] * int(one["pixel_attention_mask"].sum()) + tokenizer.encode(piece).ids
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "stand_in": stand_in}
    if made:
        inputs["padded"] = torch.cat([one["pixel_values"] for one in made]).float()
        inputs["pixel_attention_mask"] = torch.cat([one["pixel_attention_mask"] for one in made])
        inputs["spatial_shapes"] = torch.cat([one["spatial_shapes"] for one in made])
        inputs["pixel_values"] = inputs["padded"][inputs["pixel_attention_mask"].bool()]
    return inputs
