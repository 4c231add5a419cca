"""Phi-3.5-vision, after Microsoft's modeling, image_embedding, image_processing and processing
files (`*_phi3_v.py`), read beside vLLM's phi3v.py.

The authors' code builds CLIP ViT-L/14 at 336 whatever the config says; a "vision_config" in the
config may state smaller numbers here, with the names of Transformers' CLIPVisionConfig. In the
authors' ids a picture's tokens are minus its number; vLLM writes 32044, the tokenizer's
`<|image|>`, and so does this.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import nn

CLIP_L = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_of(config: dict[str, Any]) -> dict[str, Any]:
    return {**CLIP_L, **config.get("vision_config", {})}


class Holder(nn.Module):
    """A namespace of modules and parameters."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)


class ClipLayer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d = c["hidden_size"]
        self.heads = c["num_attention_heads"]
        self.self_attn = Holder(
            k_proj=nn.Linear(d, d), v_proj=nn.Linear(d, d), q_proj=nn.Linear(d, d),
            out_proj=nn.Linear(d, d),
        )  # fmt: skip
        self.layer_norm1 = nn.LayerNorm(d, eps=1e-5)
        self.mlp = Holder(
            fc1=nn.Linear(d, c["intermediate_size"]), fc2=nn.Linear(c["intermediate_size"], d)
        )
        self.layer_norm2 = nn.LayerNorm(d, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        h, a = self.layer_norm1(x), self.self_attn
        q, k, v = (
            p(h).view(n, t, self.heads, -1).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        w = (q @ k.transpose(2, 3) / math.sqrt(d // self.heads)).softmax(-1)
        x = x + a.out_proj((w @ v).transpose(1, 2).reshape(n, t, d))
        h = self.mlp.fc1(self.layer_norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))


class Clip(nn.Module):
    """All layers exist, as in the checkpoint; the features are those before the last one."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d, side = c["hidden_size"], c["image_size"] // c["patch_size"]
        self.embeddings = Holder(
            class_embedding=torch.zeros(d),
            patch_embedding=nn.Conv2d(3, d, c["patch_size"], c["patch_size"], bias=False),
            position_embedding=nn.Embedding(side * side + 1, d),
        )
        self.pre_layrnorm = nn.LayerNorm(d, eps=1e-5)
        self.encoder = Holder(
            layers=nn.ModuleList(ClipLayer(c) for _ in range(c["num_hidden_layers"]))
        )
        self.post_layernorm = nn.LayerNorm(d, eps=1e-5)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        e = self.embeddings
        x = e.patch_embedding(pictures).flatten(2).transpose(1, 2)
        x = torch.cat((e.class_embedding.expand(len(x), 1, -1), x), 1)
        states = [self.pre_layrnorm(x + e.position_embedding.weight)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states[-2][:, 1:]


class Norm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d, inner = c["hidden_size"], c["intermediate_size"]
        self.heads, self.kv = c["num_attention_heads"], c["num_key_value_heads"]
        self.dim = d // self.heads
        self.self_attn = Holder(
            o_proj=nn.Linear(d, d, bias=False),
            qkv_proj=nn.Linear(d, (self.heads + 2 * self.kv) * self.dim, bias=False),
        )
        self.mlp = Holder(
            gate_up_proj=nn.Linear(d, 2 * inner, bias=False),
            down_proj=nn.Linear(inner, d, bias=False),
        )
        self.input_layernorm = Norm(d, c["rms_norm_eps"])
        self.post_attention_layernorm = Norm(d, c["rms_norm_eps"])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        t = len(x)
        qkv = self.self_attn.qkv_proj(self.input_layernorm(x)).view(t, -1, self.dim)
        q, k, v = qkv.transpose(0, 1).split((self.heads, self.kv, self.kv))
        q, k = (p * cos + torch.cat((-p[..., p.shape[-1] // 2 :], p[..., : p.shape[-1] // 2]), -1)
                * sin for p in (q, k))  # fmt: skip
        k, v = (p.repeat_interleave(self.heads // self.kv, 0) for p in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(self.dim)
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf).softmax(-1)
        x = x + self.self_attn.o_proj((scores @ v).transpose(0, 1).reshape(t, -1))
        gate, up = self.mlp.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, -1)
        return x + self.mlp.down_proj(up * F.silu(gate))


class Phi3V(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c, clip = c, clip_of(c)
        d, wide = c["hidden_size"], 4 * clip["hidden_size"]
        self.model = Holder(
            embed_tokens=nn.Embedding(c["vocab_size"], d),
            vision_embed_tokens=Holder(
                img_processor=Holder(vision_model=Clip(clip)),
                glb_GN=torch.zeros(1, 1, wide),
                sub_GN=torch.zeros(1, 1, 1, wide),
                img_projection=nn.Sequential(nn.Linear(wide, d), nn.GELU(), nn.Linear(d, d)),
            ),
            layers=nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
            norm=Norm(d, c["rms_norm_eps"]),
        )
        self.lm_head = nn.Linear(d, c["vocab_size"], bias=False)
        self.seen: tuple[Any, Any] = (None, None)  # the last pictures, and what they became

    def rows(self, crops: torch.Tensor, high: int, wide: int) -> torch.Tensor:
        """2 x 2 patches merged, crops in their places, `sub_GN` after each row."""
        vision = self.model.vision_embed_tokens
        _, patches, d = crops.shape
        half = math.isqrt(patches) // 2
        x = crops.view(high, wide, half, 2, half, 2, d).permute(0, 2, 1, 4, 3, 5, 6)
        x = x.reshape(high * half, wide * half, 4 * d)
        return torch.cat((x, vision.sub_GN[0].expand(len(x), 1, -1)), 1).flatten(0, 1)

    def picture(self, crops: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        vision, side = self.model.vision_embed_tokens, clip_of(self.c)["image_size"]
        features = vision.img_processor.vision_model(crops)
        parts = (
            self.rows(features[1:], size[0] // side, size[1] // side),
            vision.glb_GN[0],
            self.rows(features[:1], 1, 1),
        )
        return vision.img_projection(torch.cat(parts))

    def angles(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rope; with "su" or "longrope" scaling a factor for each frequency, short or long."""
        c = self.c
        dim = c["hidden_size"] // c["num_attention_heads"]
        factors, scale = torch.ones(dim // 2), 1.0
        scaling, original = c.get("rope_scaling"), c.get("original_max_position_embeddings")
        if scaling:
            name = "long_factor" if count > original else "short_factor"
            factors = torch.tensor(scaling[name])
            ratio = c["max_position_embeddings"] / original
            if ratio > 1:
                scale = math.sqrt(1 + math.log(ratio) / math.log(original))
        base = c["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
        angles = torch.arange(count).float()[:, None] / (factors * base)
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * scale, angles.sin() * scale

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        ids = inputs["input_ids"][0]
        x = self.model.embed_tokens(ids)
        if "pixel_values" in inputs:
            if self.seen[0] is not inputs["crops"]:
                pictures = zip(inputs["crops"], inputs["image_sizes"], strict=True)
                features = torch.cat([self.picture(*one) for one in pictures])
                self.seen = (inputs["crops"], features)
            x = x.clone()
            # One that the model writes itself is a word like others.
            places = (ids == inputs["image_id"]).nonzero().flatten()
            x[places[: len(self.seen[1])]] = self.seen[1]
        cos, sin = self.angles(len(ids))
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.model.norm(x))


def build(config: dict[str, Any]) -> nn.Module:
    return Phi3V(config)


def hd_picture(image: Image.Image, most: int, side: int) -> Image.Image:
    """As many columns of crops as fit in `most`, then white above and below (authors: 336)."""
    image = image.convert("RGB")
    turned = image.width < image.height
    if turned:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio, scale = image.width / image.height, 1
    while scale * np.ceil(scale / ratio) <= most:
        scale += 1
    scale -= 1
    width, height = int(scale * side), int(int(scale * side) / ratio)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    target = int(np.ceil(height / side) * side)
    padded = Image.new("RGB", (width, target), (255, 255, 255))
    padded.paste(image, (0, int((target - height) / 2)))
    return padded.transpose(Image.Transpose.TRANSPOSE) if turned else padded


def crops_of(image: Image.Image, settings: dict[str, Any], side: int) -> tuple[torch.Tensor, Any]:
    picture = hd_picture(image, settings.get("num_crops", 1), side)
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    mean = torch.tensor(settings.get("image_mean", MEAN)).view(3, 1, 1)
    std = torch.tensor(settings.get("image_std", STD)).view(3, 1, 1)
    x = (x - mean) / std
    whole = F.interpolate(x[None], size=(side, side), mode="bicubic")
    h, w = x.shape[1:]
    tiles = x.view(3, h // side, side, w // side, side).permute(1, 3, 0, 2, 4)
    return torch.cat((whole, tiles.reshape(-1, 3, side, side))), (h, w)


def encode(
    folder: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    audio: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The pieces between pictures are tokenised each alone, so each begins as a text does."""
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | options
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    number, flat = 0, []
    for message in messages:
        content = ""
        for part in message["content"]:
            if part["type"] == "image":
                number += 1
                content += f"<|image_{number}|>"
            else:
                content += part["text"]
        flat.append({"role": message["role"], "content": content})
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(
        messages=flat, add_generation_prompt=True, eos_token="<|endoftext|>", bos_token="<s>"
    )
    clip = clip_of(config)
    side, image_id = clip["image_size"], tokenizer.token_to_id("<|image|>")
    half = side // clip["patch_size"] // 2
    made = [crops_of(image, settings, side) for image in images]
    pieces = re.split(r"<\|image_(\d+)\|>", text)
    ids: list[int] = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            ids += tokenizer.encode(piece).ids
            continue
        h, w = made[int(piece) - 1][1]
        count = (h // side * w // side + 1) * half * half + 1 + (h // side + 1) * half
        ids += [image_id] * count
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "image_id": image_id}
    if made:
        inputs["crops"] = [crops for crops, _ in made]
        inputs["image_sizes"] = [size for _, size in made]
        inputs["pixel_values"] = torch.cat(inputs["crops"])
    return inputs
