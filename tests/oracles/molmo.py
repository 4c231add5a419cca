"""Molmo (7B-D, 7B-O, 72B), after Ai2's modeling, image_preprocessing and preprocessing files
(`*_molmo.py`), read beside vLLM's molmo.py and mlx-vlm's.

The authors' code builds CLIP ViT-L/14 at 336, `vit_layers` and 128 more embeddings whatever the
config says; a "vision_config" in the config may state smaller numbers here, with the names of their
VisionBackboneConfig, and "vit_layers" and "additional_vocab_size" stand beside it.

Of one request's pictures the authors' processor puts all but the first in the wrong places: it
takes one picture, and so does this. It says how much of each patch is padding for the crops alone
and adds the row that is missing at the end, not at the start: the whole picture is told of the
first crop's padding, each crop of the next one's, the last that all of it is partly padding. The
weights were trained so; vLLM (which runs that processor) and mlx-vlm do the same. mlx-vlm resizes
levels with Pillow, the authors values in float32; it also writes "User: ..." on a line of its own.
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

CLIP_L = {
    "image_default_input_size": [336, 336],
    "image_patch_size": 14,
    "image_emb_dim": 1024,
    "image_num_heads": 16,
    "image_num_layers": 23,
    "image_mlp_dim": 4096,
    "image_num_pos": 577,
    "image_norm_eps": 1e-5,
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_of(config: dict[str, Any]) -> dict[str, Any]:
    return {**CLIP_L, **config.get("vision_config", {})}


class Bag(nn.Module):
    """Named modules and parameters."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)


class RMS(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt())


def heads_bag(inner: int, d: int) -> Bag:
    return Bag(
        wq=nn.Linear(inner, d), wk=nn.Linear(inner, d), wv=nn.Linear(inner, d), wo=nn.Linear(d, d)
    )


def look(a: Bag, heads: int, asking: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Attention of (n, few, inner) to (n, many, inner)."""
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in (a.wq(asking), a.wk(asked), a.wv(asked))
    )
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
    return a.wo((weights @ v).transpose(1, 2).flatten(2))


class Tower(nn.Module):
    """The hidden states after each layer, class token first."""

    def __init__(self, v: dict[str, Any]) -> None:
        super().__init__()
        d, inner, eps = v["image_emb_dim"], v["image_mlp_dim"], v["image_norm_eps"]
        self.heads = v["image_num_heads"]
        self.class_embedding = nn.Parameter(torch.zeros(d))
        self.positional_embedding = nn.Parameter(torch.zeros(v["image_num_pos"], d))
        self.patch_embedding = nn.Linear(3 * v["image_patch_size"] ** 2, d, bias=False)
        self.pre_ln = nn.LayerNorm(d, eps=eps)
        self.transformer = Bag(
            resblocks=nn.ModuleList(
                Bag(
                    attention=heads_bag(d, d),
                    feed_forward=Bag(w1=nn.Linear(d, inner), w2=nn.Linear(inner, d)),
                    attention_norm=nn.LayerNorm(d, eps=eps),
                    ffn_norm=nn.LayerNorm(d, eps=eps),
                )
                for _ in range(v["image_num_layers"])
            )
        )

    def forward(self, crops: torch.Tensor) -> list[torch.Tensor]:
        x = self.patch_embedding(crops)
        x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), 1)
        x = self.pre_ln(x + self.positional_embedding)
        states = []
        for block in self.transformer.resblocks:
            h = block.attention_norm(x)
            x = x + look(block.attention, self.heads, h, h)
            h = block.feed_forward.w1(block.ffn_norm(x))
            x = x + block.feed_forward.w2(h * torch.sigmoid(1.702 * h))
            states.append(x)
        return states


class Block(nn.Module):
    """`norm_after` puts the two norms behind what they belong to, `attention_layer_norm` one over
    all queries and one over all keys.
    """

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d, inner, eps = c["hidden_size"], c["intermediate_size"], c["layer_norm_eps"]
        self.heads = c["num_attention_heads"]
        self.kv = c.get("num_key_value_heads") or self.heads
        self.theta, self.after = c["rope_theta"], c.get("norm_after", False)
        few = d // self.heads * self.kv
        self.widths = (d, few, few)
        self.att_proj = nn.Linear(d, d + 2 * few, bias=c.get("qkv_bias", False))
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_proj = nn.Linear(d, inner, bias=False)
        self.ff_out = nn.Linear(inner // 2, d, bias=False)
        self.attn_norm, self.ff_norm = RMS(d, eps), RMS(d, eps)
        if c.get("attention_layer_norm", False):
            self.q_norm, self.k_norm = RMS(d, eps), RMS(few, eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        t = len(x)
        q, k, v = self.att_proj(x).split(self.widths, -1)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.view(t, n, -1).transpose(0, 1)
                   for part, n in ((q, self.heads), (k, self.kv), (v, self.kv)))  # fmt: skip
        dim = q.shape[-1]
        turn = torch.arange(t).float()[:, None] / self.theta ** (torch.arange(0, dim, 2) / dim)
        cos, sin = turn.cos(), turn.sin()

        def rope(p: torch.Tensor) -> torch.Tensor:
            a, b = p.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        q, k = rope(q), rope(k)
        k, v = (p.repeat_interleave(self.heads // self.kv, 0) for p in (k, v))
        scores = (q @ k.transpose(1, 2) / math.sqrt(dim)).masked_fill(
            ~torch.ones(t, t).tril().bool(), -math.inf
        )
        return self.attn_out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = self.ff_proj(x).chunk(2, -1)
        return self.ff_out(F.silu(gate) * x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.after:
            x = x + self.attn_norm(self.attend(x))
            return x + self.ff_norm(self.feed(x))
        x = x + self.attend(self.attn_norm(x))
        return x + self.feed(self.ff_norm(x))


class Molmo(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c, self.v = c, clip_of(c)
        d, half, wide = c["hidden_size"], c["intermediate_size"] // 2, self.v["image_emb_dim"]
        rows = c.get("embedding_size") or c["vocab_size"]
        self.chosen = c.get("vit_layers", [-2, -9])
        both = wide * len(self.chosen)
        self.model = Bag(
            transformer=Bag(
                wte=Bag(
                    embedding=torch.zeros(rows, d),
                    new_embedding=torch.zeros(c.get("additional_vocab_size", 128), d),
                ),
                ln_f=RMS(d, c["layer_norm_eps"]),
                blocks=nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"])),
                ff_out=nn.Linear(d, rows, bias=False),
            ),
            vision_backbone=Bag(
                image_vit=Tower(self.v),
                image_pooling_2d=heads_bag(both, wide),
                image_projector=Bag(
                    w1=nn.Linear(wide, half, bias=False),
                    w2=nn.Linear(half, d, bias=False),
                    w3=nn.Linear(wide, half, bias=False),
                ),
                pad_embed=torch.zeros(2, both),
            ),
        )
        self.seen: tuple[Any, Any] = (None, None)  # the last picture, and what it became

    def picture(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The whole's features, then the crops', row by row as if they were one picture."""
        b, crops, masks = self.model.vision_backbone, inputs["pixel_values"], inputs["masks"]
        states = b.image_vit(crops)
        x = torch.cat([states[i] for i in self.chosen], -1)[:, 1:]
        empty = (masks == 0).float()[..., None]
        partly = ((masks < 1) & (masks != 0)).float()[..., None]
        x = x + b.pad_embed[0] * empty + b.pad_embed[1] * partly
        side = math.isqrt(x.shape[1])
        x = x.unflatten(1, (side // 2, 2, side // 2, 2)).transpose(2, 3).flatten(3, 4)
        x = x.flatten(0, 2)  # (crops * pooled patches, 4, width)
        x = look(b.image_pooling_2d, self.v["image_num_heads"], x.mean(1, keepdim=True), x)
        p = b.image_projector
        x = p.w2(F.silu(p.w1(x)) * p.w3(x)).view(len(crops), side // 2, side // 2, -1)
        high, wide = inputs["tiling"]
        left, right = (margin // 2 for margin in inputs["margins"])

        def kept(i: int, count: int) -> slice:
            return slice(0 if i == 0 else left, side // 2 - (0 if i == count - 1 else right))

        local = x[1:].unflatten(0, (high, wide))
        bands = [
            torch.cat([local[i, j, kept(i, high), kept(j, wide)] for j in range(wide)], 1)
            for i in range(high)
        ]
        return torch.cat((x[0].flatten(0, 1), torch.cat(bands).flatten(0, 1)))

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        ids, t = inputs["input_ids"][0], self.model.transformer
        x = torch.cat((t.wte.embedding, t.wte.new_embedding))[ids]
        if "pixel_values" in inputs:
            if self.seen[0] is not inputs["pixel_values"]:
                self.seen = (inputs["pixel_values"], self.picture(inputs))
            places = (ids == inputs["patch_id"]).nonzero().flatten()[: len(self.seen[1])]
            x = x.clone()
            x[places] += self.seen[1]
        for block in t.blocks:
            x = block(x)
        return t.ff_out(t.ln_f(x))


def build(config: dict[str, Any]) -> nn.Module:
    return Molmo(config)


def tiling_of(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """The smallest tiling that needs no shrinking, else the one that needs the least."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    with np.errstate(divide="ignore"):
        scale = (np.array(grids, np.float32) * window / np.array([height, width], np.float32)).min(
            -1
        )
    if (scale < 1).all():
        return grids[int(scale.argmax())]
    return grids[int(np.where(scale < 1, 10e9, scale).argmin())]


def fitted(values: torch.Tensor, high: int, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture (3, h, w) in the middle of zeros, then normalised; and where it lies."""
    _, h, w = values.shape
    scale = min(np.float32(high) / np.float32(h), np.float32(wide) / np.float32(w))
    size = (int(np.float32(h) * scale), int(np.float32(w) * scale))
    if min(size) < 1:
        raise ValueError(f"a picture of {w}x{h} has nothing left")
    if size != (h, w):
        values = F.interpolate(values[None], size, mode="bilinear", antialias=True)[0]
    values = values.clamp(0, 1)
    top, left = (high - size[0]) // 2, (wide - size[1]) // 2
    around = (left, wide - size[1] - left, top, high - size[0] - top)
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (MEAN, STD))
    shown = F.pad(torch.ones(size), around)
    return (F.pad(values, around) - mean) / std, shown


def patches_of(picture: torch.Tensor, size: int) -> torch.Tensor:
    """(channels, h, w) to (patches, size * size * channels)."""
    cut = picture.unfold(1, size, size).unfold(2, size, size)
    return cut.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


def crops_of(image: Image.Image, s: dict[str, Any]) -> dict[str, Any]:
    side, size = s["base_image_input_size"][0], s["image_patch_size"]
    left, right = s["overlap_margins"]
    margin = (left + right) * size
    window = side - margin
    values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    h, w = values.shape[1:]
    high, wide = tiling_of(h - margin, w - margin, window, s["max_crops"])
    large, shown = fitted(values, high * window + margin, wide * window + margin)
    crops, masks = [patches_of(fitted(values, side, side)[0], size)], []
    for i in range(high):
        for j in range(wide):
            down, across = (slice(n * window, n * window + side) for n in (i, j))
            crops.append(patches_of(large[:, down, across], size))
            masks.append(patches_of(shown[None, down, across], size).mean(-1))
    masks.append(torch.full_like(masks[0], -1))
    rows, columns = (n * window // size + left + right for n in (high, wide))
    return {
        "pixel_values": torch.stack(crops),
        "masks": torch.stack(masks),
        "tiling": (high, wide),
        "margins": (left, right),
        "pooled": ((rows + 1) // 2, (columns + 1) // 2),
    }


def encode(
    folder: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    audio: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """A beginning, the picture, then " User: ... Assistant:", which is the template's text behind a
    space: the tokenizer has no beginning token, its end stands in.
    """
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | options
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = json.loads((folder / "tokenizer_config.json").read_text())
    flat = [
        {
            "role": message["role"],
            "content": "".join(p["text"] for p in message["content"] if p["type"] == "text"),
        }
        for message in messages
    ]
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        named["chat_template"]
    )
    text = " " + template.render(messages=flat, add_generation_prompt=True)
    ids = [tokenizer.token_to_id(named.get("bos_token") or named["eos_token"])]
    start, end, patch, column = (
        tokenizer.token_to_id(f"<im_{name}>") for name in ("start", "end", "patch", "col")
    )
    inputs: dict[str, Any] = {"patch_id": patch}
    if images:
        inputs |= crops_of(images[0], settings)
        base = (settings["image_token_length_h"], settings["image_token_length_w"])
        for rows, columns in (base, inputs["pooled"]):
            ids += [start, *([patch] * columns + [column]) * rows, end]
    ids += tokenizer.encode(text, add_special_tokens=False).ids
    return {**inputs, "input_ids": torch.tensor([ids])}
