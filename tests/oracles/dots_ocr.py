"""dots.ocr, after the authors' modeling_dots_vision.py (as kept in several public repositories),
their demo_hf.py and image_utils.py, read beside vLLM's dots_ocr.py and mlx-vlm's dots_ocr.

All agree on the tower. The authors' `smart_resize` keeps every side at one cell at the least, but
the processor that their demo_hf.py runs is Transformers' of Qwen2-VL, which lets a side round to
nothing before the area is checked; this follows the processor (a narrow picture is then enlarged
by its area in both). A picture with an aspect over 200 is refused by both.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import nn

VIT = {
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
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Bag(nn.Module):
    """Parts under names."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Rms(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps)


def turned(x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """x (heads, tokens, dim) turned by angle (tokens, dim / 2), pairs half a head apart."""
    first, second = x.chunk(2, -1)
    c, s = angle.cos(), angle.sin()
    return torch.cat((first * c - second * s, second * c + first * s), -1)


class TowerBlock(nn.Module):
    def __init__(self, v: dict[str, Any]) -> None:
        super().__init__()
        width, inner, bias = v["embed_dim"], v["intermediate_size"], v["use_bias"]
        self.heads = v["num_attention_heads"]
        self.norm1, self.norm2 = (Rms(width, v["rms_norm_eps"]) for _ in range(2))
        self.attn = Bag(
            qkv=nn.Linear(width, 3 * width, bias=bias), proj=nn.Linear(width, width, bias=bias)
        )
        self.mlp = Bag(
            fc1=nn.Linear(width, inner, bias=bias),
            fc2=nn.Linear(inner, width, bias=bias),
            fc3=nn.Linear(width, inner, bias=bias),
        )

    def forward(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1).permute(1, 2, 0, 3)
        q, k = turned(q, angle), turned(k, angle)
        seen = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + self.attn.proj(seen.transpose(0, 1).flatten(1))
        h = self.norm2(x)
        return x + self.mlp.fc2(F.silu(self.mlp.fc1(h)) * self.mlp.fc3(h))


class Tower(nn.Module):
    def __init__(self, v: dict[str, Any]) -> None:
        super().__init__()
        self.v, width, patch = v, v["embed_dim"], v["patch_size"]
        together = width * v["spatial_merge_size"] ** 2
        self.patch_embed = Bag(
            patchifier=Bag(
                proj=nn.Conv2d(v["num_channels"], width, patch, patch),
                norm=Rms(width, v["rms_norm_eps"]),
            )
        )
        self.blocks = nn.ModuleList(TowerBlock(v) for _ in range(v["num_hidden_layers"]))
        if v["post_norm"]:
            self.post_trunk_norm = Rms(width, v["rms_norm_eps"])
        self.merger = Bag(
            ln_q=nn.LayerNorm(width, eps=1e-6),
            mlp=nn.Sequential(
                nn.Linear(together, together), nn.GELU(), nn.Linear(together, v["hidden_size"])
            ),
        )

    def angles(self, high: int, wide: int) -> torch.Tensor:
        """By row, then by column, in the order of the patches.  # (patches, dim / 2)"""
        quarter = self.v["embed_dim"] // self.v["num_attention_heads"] // 4
        speed = 10000.0 ** -(torch.arange(quarter) / quarter)
        merge, order = self.v["spatial_merge_size"], []
        for top in range(0, high, merge):
            for left in range(0, wide, merge):
                for i in range(merge):
                    order += [(top + i, left + j) for j in range(merge)]
        place = torch.tensor(order).float()
        return torch.cat((place[:, :1] * speed, place[:, 1:] * speed), -1)

    def forward(self, patches: torch.Tensor, high: int, wide: int) -> torch.Tensor:
        """One picture's patches (patches, values) to (tokens, hidden)."""
        size = self.v["patch_size"]
        first = patches.view(len(patches), self.v["num_channels"], -1, size, size)[:, :, 0]
        embed = self.patch_embed.patchifier
        x, angle = embed.norm(embed.proj(first)[:, :, 0, 0]), self.angles(high, wide)
        for block in self.blocks:
            x = block(x, angle)
        if self.v["post_norm"]:
            x = self.post_trunk_norm(x)
        four = self.v["spatial_merge_size"] ** 2
        return self.merger.mlp(self.merger.ln_q(x).reshape(len(x) // four, -1))


class Layer(nn.Module):
    """A layer of Qwen2: biases on queries, keys and values alone."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        width, inner, eps = c["hidden_size"], c["intermediate_size"], c["rms_norm_eps"]
        self.heads, self.shared = c["num_attention_heads"], c["num_key_value_heads"]
        dim = width // self.heads
        self.self_attn = Bag(
            q_proj=nn.Linear(width, width),
            k_proj=nn.Linear(width, self.shared * dim),
            v_proj=nn.Linear(width, self.shared * dim),
            o_proj=nn.Linear(width, width, bias=False),
        )
        self.mlp = Bag(
            gate_proj=nn.Linear(width, inner, bias=False),
            up_proj=nn.Linear(width, inner, bias=False),
            down_proj=nn.Linear(inner, width, bias=False),
        )
        self.input_layernorm, self.post_attention_layernorm = Rms(width, eps), Rms(width, eps)

    def forward(self, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        a, h, t = self.self_attn, self.input_layernorm(x), len(x)
        q = turned(a.q_proj(h).view(t, self.heads, -1).transpose(0, 1), angle)
        k = turned(a.k_proj(h).view(t, self.shared, -1).transpose(0, 1), angle)
        v = a.v_proj(h).view(t, self.shared, -1).transpose(0, 1)
        k, v = (p.repeat_interleave(self.heads // self.shared, 0) for p in (k, v))
        score = q @ k.mT * q.shape[-1] ** -0.5 + torch.full((t, t), -math.inf).triu(1)
        x = x + a.o_proj((score.softmax(-1) @ v).transpose(0, 1).flatten(1))
        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))


class DotsOCR(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c, width = c, c["hidden_size"]
        self.vision_tower = Tower({**VIT, **c["vision_config"]})
        self.model = Bag(
            embed_tokens=nn.Embedding(c["vocab_size"], width),
            layers=nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
            norm=Rms(width, c["rms_norm_eps"]),
        )
        if not c.get("tie_word_embeddings"):
            self.lm_head = nn.Linear(width, c["vocab_size"], bias=False)
        self.seen: tuple[Any, Any] = (None, None)  # the last pictures, and what they became

    def pictures(self, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        if self.seen[0] is not pixels:
            sizes = [(int(high), int(wide)) for _, high, wide in grids]
            parts = pixels.split([high * wide for high, wide in sizes])
            made = [self.vision_tower(part, *size) for part, size in zip(parts, sizes, strict=True)]
            self.seen = (pixels, torch.cat(made))
        return self.seen[1]

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        ids = inputs["input_ids"][0]
        x = self.model.embed_tokens(ids)
        if "pixel_values" in inputs:
            features = self.pictures(inputs["pixel_values"], inputs["image_grid_thw"])
            # One that the model writes itself is a word like others.
            places = (ids == self.c["image_token_id"]).nonzero()[: len(features), 0]
            x = x.index_copy(0, places, features)
        half = self.c["hidden_size"] // self.c["num_attention_heads"] // 2
        speed = self.c["rope_theta"] ** -(torch.arange(half) / half)
        angle = torch.arange(len(ids))[:, None] * speed
        for layer in self.model.layers:
            x = layer(x, angle)
        x = self.model.norm(x)
        if self.c.get("tie_word_embeddings"):
            return x @ self.model.embed_tokens.weight.T
        return self.lm_head(x)


def build(config: dict[str, Any]) -> nn.Module:
    return DotsOCR(config)


def size_for(width: int, height: int, cell: int, least: int, most: int) -> tuple[int, int]:
    if max(width, height) > 200 * min(width, height):
        raise ValueError("absolute aspect ratio must be smaller than 200")
    w, h = round(width / cell) * cell, round(height / cell) * cell
    if w * h > most:
        shrink = math.sqrt(width * height / most)
        w, h = (max(cell, math.floor(n / shrink / cell) * cell) for n in (width, height))
    elif w * h < least:
        grow = math.sqrt(least / (width * height))
        w, h = (math.ceil(n * grow / cell) * cell for n in (width, height))
    return w, h


def patches_of(image: Image.Image, v: dict[str, Any], s: dict[str, Any]) -> tuple[Any, Any]:
    """Patches, squares of cells together, each value as often as a clip has frames."""
    patch, merge = s.get("patch_size", v["patch_size"]), s.get("merge_size", 2)
    least, most = s.get("min_pixels", 3136), s.get("max_pixels", 11289600)
    size = size_for(*image.size, patch * merge, least, most)
    x = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    x = (x / 255 - np.float32(s.get("image_mean", MEAN))) / np.float32(s.get("image_std", STD))
    rows, columns = size[1] // patch, size[0] // patch
    x = x.reshape(rows // merge, merge, patch, columns // merge, merge, patch, 3)
    x = x.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    x = x.repeat(s.get("temporal_patch_size", 1), axis=5)
    return torch.from_numpy(x.reshape(rows * columns, -1)), (1, rows, columns)


def encode(
    folder: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    audio: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | options
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vision = {**VIT, **config["vision_config"]}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(messages=messages, add_generation_prompt=True)
    made = [patches_of(image, vision, settings) for image in images]
    start, *rest = text.split("<|imgpad|>")
    for (_, (_, rows, columns)), piece in zip(made, rest, strict=True):
        start += "<|imgpad|>" * (rows * columns // vision["spatial_merge_size"] ** 2) + piece
    inputs: dict[str, Any] = {"input_ids": torch.tensor([tokenizer.encode(start).ids])}
    if made:
        inputs["pixel_values"] = torch.cat([patches for patches, _ in made])
        inputs["image_grid_thw"] = torch.tensor([grid for _, grid in made])
    return inputs
