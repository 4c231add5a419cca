"""DeepSeek-OCR, after the authors' repository (deepencoder/sam_vary_sdpa, clip_sdpa, deepseek_ocr,
process/image_process) and vLLM's deepseek_ocr.py and deepencoder.py.

mlx-vlm's CLIP has an exact GELU and norms of 1e-6; the authors' has x * sigmoid(1.702 x) and 1e-5,
as here. Sizes of both towers come from the config's "width" table. `base_size` and `image_size` are
arguments of the authors' `infer`, here options; without cropping all their modes have both alike,
and up to 640 they squeeze the picture into the square. Their "plain" conversation strips every
message and joins them with nothing, after one beginning token.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import nn


class Group(nn.Module):
    """A namespace of modules and parameters."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)


def resized(table: torch.Tensor, side: int) -> torch.Tensor:
    """A square table (n, n, d) at another side."""
    if table.shape[0] == side:
        return table
    as_image = table.permute(2, 0, 1)[None]
    made = F.interpolate(
        as_image, size=(side, side), mode="bicubic", antialias=True, align_corners=False
    )
    return made[0].permute(1, 2, 0)


class Norm2d(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(1, keepdim=True)
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class SamBlock(nn.Module):
    def __init__(self, d: int, heads: int, mlp: int, window: int, table: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm1 = nn.LayerNorm(d, eps=1e-6)
        self.attn = Group(
            qkv=nn.Linear(d, 3 * d),
            proj=nn.Linear(d, d),
            rel_pos_h=torch.zeros(2 * table - 1, d // heads),
            rel_pos_w=torch.zeros(2 * table - 1, d // heads),
        )
        self.norm2 = nn.LayerNorm(d, eps=1e-6)
        self.mlp = Group(lin1=nn.Linear(d, mlp), lin2=nn.Linear(mlp, d))

    def offsets(self, table: torch.Tensor, side: int) -> torch.Tensor:
        """Row i, column j: the table's entry for a distance of i - j.  # (side, side, head)"""
        span = 2 * side - 1
        if len(table) != span:
            table = F.interpolate(table.T[None], size=span, mode="linear")[0].T
        place = torch.arange(side)
        return table[place[:, None] - place[None, :] + side - 1]

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        n, side, _, d = x.shape
        qkv = self.attn.qkv(x).view(n, side * side, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        grid = q.reshape(n, self.heads, side, side, -1)
        rows = torch.einsum("nhyxc,ykc->nhyxk", grid, self.offsets(self.attn.rel_pos_h, side))
        columns = torch.einsum("nhyxc,xkc->nhyxk", grid, self.offsets(self.attn.rel_pos_w, side))
        bias = (rows[..., :, None] + columns[..., None, :]).reshape(n, self.heads, side * side, -1)
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
        return self.attn.proj((weights @ v).transpose(1, 2).reshape(n, side, side, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = self.norm1(x), self.window
        if not w:
            h = self.attend(h)
        else:
            n, side, _, d = h.shape
            whole = math.ceil(side / w) * w
            h = F.pad(h, (0, 0, 0, whole - side, 0, whole - side))
            h = h.view(n, whole // w, w, whole // w, w, d).transpose(2, 3).reshape(-1, w, w, d)
            h = self.attend(h).view(n, whole // w, whole // w, w, w, d).transpose(2, 3)
            h = h.reshape(n, whole, whole, d)[:, :side, :side]
        x = x + h
        return x + self.mlp.lin2(F.gelu(self.mlp.lin1(self.norm2(x))))


class Sam(nn.Module):
    def __init__(self, c: dict[str, Any], size: int) -> None:
        super().__init__()
        d, out = c["width"], 256
        window, whole = 14, set(c["global_attn_indexes"])
        side = size // 16
        self.patch_embed = Group(proj=nn.Conv2d(3, d, 16, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, d))
        self.blocks = nn.ModuleList(
            SamBlock(
                d,
                c["heads"],
                4 * d,
                0 if i in whole else window,
                side if i in whole else window,
            )
            for i in range(c["layers"])
        )
        self.neck = nn.Sequential(
            nn.Conv2d(d, out, 1, bias=False),
            Norm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            Norm2d(out),
        )
        first, second = c["downsample_channels"]
        self.net_2 = nn.Conv2d(out, first, 3, stride=2, padding=1, bias=False)
        self.net_3 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.proj(pictures).permute(0, 2, 3, 1)
        x = x + resized(self.pos_embed[0], x.shape[1])
        for block in self.blocks:
            x = block(x)
        return self.net_3(self.net_2(self.neck(x.permute(0, 3, 1, 2))))


class Clip(nn.Module):
    """Its patches are SAM's features; its own patch embedding is in the checkpoint, unused."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d, self.heads = c["width"], c["heads"]
        patches = (c["image_size"] // c["patch_size"]) ** 2
        self.embeddings = Group(
            class_embedding=torch.zeros(d),
            patch_embedding=nn.Conv2d(3, d, c["patch_size"], c["patch_size"], bias=False),
            position_embedding=nn.Embedding(patches + 1, d),
        )
        self.transformer = Group(
            layers=nn.ModuleList(
                Group(
                    self_attn=Group(qkv_proj=nn.Linear(d, 3 * d), out_proj=nn.Linear(d, d)),
                    layer_norm1=nn.LayerNorm(d, eps=1e-5),
                    layer_norm2=nn.LayerNorm(d, eps=1e-5),
                    mlp=Group(fc1=nn.Linear(d, 4 * d), fc2=nn.Linear(4 * d, d)),
                )
                for _ in range(c["layers"])
            )
        )
        self.pre_layrnorm = nn.LayerNorm(d, eps=1e-5)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        patches = features.flatten(2).transpose(1, 2)
        n, t, d = patches.shape
        x = torch.cat((self.embeddings.class_embedding.expand(n, 1, d), patches), 1)
        table = self.embeddings.position_embedding.weight
        side = math.isqrt(len(table) - 1)
        places = resized(table[1:].view(side, side, d), math.isqrt(t)).reshape(-1, d)
        x = self.pre_layrnorm(x + torch.cat((table[:1], places)))
        for layer in self.transformer.layers:
            qkv = layer.self_attn.qkv_proj(layer.layer_norm1(x)).view(n, t + 1, 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + layer.self_attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
            h = layer.mlp.fc1(layer.layer_norm2(x))
            x = x + layer.mlp.fc2(h * torch.sigmoid(1.702 * h))
        return x[:, 1:]


class Norm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def gated(d: int, inner: int) -> Group:
    return Group(
        gate_proj=nn.Linear(d, inner, bias=False),
        up_proj=nn.Linear(d, inner, bias=False),
        down_proj=nn.Linear(inner, d, bias=False),
    )


def run_gated(x: torch.Tensor, m: Group) -> torch.Tensor:
    return m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x))


class Layer(nn.Module):
    """Attention of Llama's kind, since `use_mla` is false; then a dense or a sparse MLP."""

    def __init__(self, c: dict[str, Any], dense: bool) -> None:
        super().__init__()
        d, self.c, self.dense = c["hidden_size"], c, dense
        self.self_attn = Group(
            **{f"{name}_proj": nn.Linear(d, d, bias=False) for name in ("q", "k", "v", "o")}
        )
        eps = c.get("rms_norm_eps", 1e-6)
        self.input_layernorm, self.post_attention_layernorm = Norm(d, eps), Norm(d, eps)
        inner = c["moe_intermediate_size"]
        if dense:
            self.mlp: nn.Module = gated(d, c["intermediate_size"])
        else:
            self.mlp = Group(
                gate=nn.Linear(d, c["n_routed_experts"], bias=False),
                experts=nn.ModuleList(gated(d, inner) for _ in range(c["n_routed_experts"])),
                shared_experts=gated(d, inner * c["n_shared_experts"]),
            )

    def sparse(self, x: torch.Tensor) -> torch.Tensor:
        shares, chosen = self.mlp.gate(x).softmax(-1).topk(self.c["num_experts_per_tok"])
        if self.c.get("norm_topk_prob"):
            shares = shares / shares.sum(-1, keepdim=True)
        every = torch.stack([run_gated(x, expert) for expert in self.mlp.experts], 1)
        picked = every.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
        routed = (picked * shares[..., None]).sum(1) * self.c.get("routed_scaling_factor", 1.0)
        return routed + run_gated(x, self.mlp.shared_experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t, heads = len(x), self.c["num_attention_heads"]
        h = self.input_layernorm(x)
        q, k, v = (
            getattr(self.self_attn, f"{name}_proj")(h).view(t, heads, -1).transpose(0, 1)
            for name in ("q", "k", "v")
        )
        half = q.shape[-1] // 2
        base = self.c.get("rope_theta", 10000.0)
        angle = torch.arange(t)[:, None] / base ** (torch.arange(half) / half)
        cos, sin = angle.cos(), angle.sin()
        q, k = (
            torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
            for a, b in ((p[..., :half], p[..., half:]) for p in (q, k))
        )
        scores = q @ k.transpose(1, 2) / math.sqrt(2 * half)
        scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
        x = x + self.self_attn.o_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(t, -1))
        h = self.post_attention_layernorm(x)
        return x + (run_gated(h, self.mlp) if self.dense else self.sparse(h))


class DeepseekOCR(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        c = config["language_config"]
        vision = config["vision_config"]
        sam, clip = vision["width"]["sam_vit_b"], vision["width"]["clip-l-14-224"]
        d = c["hidden_size"]
        self.model = Group(
            sam_model=Sam(sam, vision["image_size"]),
            vision_model=Clip(clip),
            projector=Group(layers=nn.Linear(config["projector_config"]["input_dim"], d)),
            image_newline=torch.zeros(d),
            view_seperator=torch.zeros(d),
            embed_tokens=nn.Embedding(c["vocab_size"], d),
            layers=nn.ModuleList(
                Layer(c, i < c["first_k_dense_replace"]) for i in range(c["num_hidden_layers"])
            ),
            norm=Norm(d, c.get("rms_norm_eps", 1e-6)),
        )
        self.lm_head = nn.Linear(d, c["vocab_size"], bias=False)
        self.seen: tuple[Any, Any] = (None, None)  # the last pictures, and what they became

    def read(self, views: torch.Tensor) -> torch.Tensor:
        """(views, 3, s, s) to (views, rows, columns, d)."""
        sam = self.model.sam_model(views)
        both = torch.cat((self.model.vision_model(sam), sam.flatten(2).transpose(1, 2)), -1)
        made = self.model.projector.layers(both)
        side = math.isqrt(made.shape[1])
        return made.unflatten(1, (side, side))

    def lines(self, grid: torch.Tensor) -> torch.Tensor:
        newline = self.model.image_newline.expand(len(grid), 1, -1)
        return torch.cat((grid, newline), 1).flatten(0, 1)

    def picture(self, whole: torch.Tensor, tiles: torch.Tensor, grid: Any) -> torch.Tensor:
        parts = []
        if len(tiles):
            wide, high = grid
            local = self.read(tiles).unflatten(0, (high, wide)).transpose(1, 2)
            side, d = local.shape[2] * local.shape[3], local.shape[-1]
            parts.append(self.lines(local.reshape(-1, side, d)))
        parts.append(self.lines(self.read(whole[None])[0]))
        return torch.cat((*parts, self.model.view_seperator[None]))

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        ids = inputs["input_ids"][0]
        x = self.model.embed_tokens(ids)
        if "views" in inputs:
            if self.seen[0] is not inputs["views"]:
                self.seen = (
                    inputs["views"],
                    torch.cat([self.picture(*v) for v in inputs["views"]]),
                )
            x = x.clone()
            x[ids == inputs["image_id"]] = self.seen[1]
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(self.model.norm(x))


def build(config: dict[str, Any]) -> nn.Module:
    return DeepseekOCR(config)


def grid_of(image: Image.Image, tile: int, low: int, high: int) -> tuple[int, int]:
    """Columns and rows of tiles: the nearest aspect; of equals the larger, if the area bears it."""
    aspect, area = image.width / image.height, image.width * image.height
    pairs = {
        (i, j)
        for n in range(low, high + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if low <= i * j <= high
    }
    best, least = (1, 1), math.inf
    for pair in sorted(pairs, key=lambda p: p[0] * p[1]):
        off = abs(aspect - pair[0] / pair[1])
        if off < least:
            best, least = pair, off
        elif off == least and area > 0.5 * tile * tile * pair[0] * pair[1]:
            best = pair
    return best


def tensor_of(image: Image.Image) -> torch.Tensor:
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (x - 0.5) / 0.5


def views_of(image: Image.Image, options: dict[str, Any]) -> tuple[Any, Any, tuple[int, int]]:
    base, tile = options.get("base_size", 1024), options.get("image_size", 640)
    cropping = options.get("cropping", True)
    image, grid = image.convert("RGB"), (1, 1)
    tiles: list[torch.Tensor] = []
    if max(image.size) > tile and cropping:
        grid = grid_of(image, tile, 2, options.get("max_patches", 9))
        large = image.resize((grid[0] * tile, grid[1] * tile))
        for j in range(grid[1]) if grid != (1, 1) else ():  # a single tile is left out
            for i in range(grid[0]):
                box = (i * tile, j * tile, (i + 1) * tile, (j + 1) * tile)
                tiles.append(tensor_of(large.crop(box)))
    if base <= 640 and not cropping:
        image = image.resize((base, base))
    whole = tensor_of(ImageOps.pad(image, (base, base), color=(127, 127, 127)))
    return whole, torch.stack(tiles) if tiles else torch.empty(0, 3, tile, tile), grid


def encode(
    folder: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    audio: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    said = [
        "".join(
            "<image>\n" if part["type"] == "image" else part["text"] for part in message["content"]
        ).strip()
        for message in messages
    ]
    image_id = tokenizer.token_to_id("<image>")
    views = [views_of(image, options) for image in images]
    ids = [config["language_config"]["bos_token_id"]]
    for i, piece in enumerate("".join(said).strip().split("<image>")):
        if i:
            whole, tiles, (wide, high) = views[i - 1]
            side = math.ceil(whole.shape[-1] / 16 / 4)
            count = side * (side + 1) + 1
            if len(tiles):
                side = math.ceil(tiles.shape[-1] / 16 / 4)
                count += high * side * (wide * side + 1)
            ids += [image_id] * count
        ids += tokenizer.encode(piece, add_special_tokens=False).ids
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "image_id": image_id}
    if views:
        inputs["views"] = views
        inputs["pixel_values"] = torch.stack([whole for whole, _, _ in views])
    return inputs
