"""DeepSeek-VL2 (tiny, small and base), after the authors' repository: modeling_deepseek_vl_v2.py,
modeling_deepseek.py, siglip_vit.py, processing_deepseek_vl_v2.py and conversation.py, read beside
mlx-vlm's port and vLLM's.

What the ports do otherwise: mlx-vlm does not divide the chosen experts' weights by their sum, which
the base model's `norm_topk_prob` asks for, and leaves the chosen groups out instead of the others;
its names are `language_model.*`, `vision.vision_tower.*` and `view_separator`. vLLM's template puts
a space behind "<|Assistant|>:"; the authors put none, and read what is between two pictures or two
turns on its own, so that the colon never joins the answer's first word. `tile_tag` "1D" is given up
in the authors' own words.

`pixel_values` holds each picture's whole view, then its tiles, row by row. With more than two
pictures each has one tile, which shows the same as the whole.
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

# What the authors' configuration classes add to a published config.
VISION = {"image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16}
PROJECTOR = {"depth": 2, "mlp_ratio": 1, "downsample_ratio": 2}
LANGUAGE = {
    "first_k_dense_replace": 0,
    "intermediate_size": 11008,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 1407,
    "moe_layer_freq": 1,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "norm_topk_prob": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "num_key_value_heads": None,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "gready",
    "use_mla": True,
    "v_head_dim": 128,
}


class Node(nn.Module):
    """Modules and parameters under their published names."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)


def matrix(inner: int, outer: int) -> nn.Linear:
    return nn.Linear(inner, outer, bias=False)


class Norm(nn.Module):
    def __init__(self, d: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """(..., heads, tokens, width) each; the queries' width sets the scale."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        later = torch.ones(scores.shape[-2:]).triu(1).bool()
        scores = scores.masked_fill(later, -math.inf)
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def two_layers(d: int, inner: int) -> Node:
    return Node(fc1=nn.Linear(d, inner), fc2=nn.Linear(inner, d))


class Siglip(nn.Module):
    """timm's names; the pooling head is in the checkpoint and `ignore_head` leaves it out."""

    def __init__(self, v: dict[str, Any]) -> None:
        super().__init__()
        d, p, self.heads = v["width"], v["patch_size"], v["heads"]
        inner = int(d * v.get("mlp_ratio", 4))
        self.patch_embed = Node(proj=nn.Conv2d(3, d, p, p))
        self.pos_embed = nn.Parameter(torch.zeros(1, (v["image_size"] // p) ** 2, d))
        self.blocks = nn.ModuleList(
            Node(
                norm1=nn.LayerNorm(d, eps=1e-6),
                attn=Node(qkv=nn.Linear(d, 3 * d), proj=nn.Linear(d, d)),
                norm2=nn.LayerNorm(d, eps=1e-6),
                mlp=two_layers(d, inner),
            )
            for _ in range(v["layers"])
        )
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.attn_pool = Node(
            latent=torch.zeros(1, 1, d),
            q=nn.Linear(d, d),
            kv=nn.Linear(d, 2 * d),
            proj=nn.Linear(d, d),
            norm=nn.LayerNorm(d, eps=1e-6),
            mlp=two_layers(d, inner),
        )

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed.proj(views).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            qkv = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, self.heads, -1))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            x = x + block.attn.proj(attend(q, k, v, causal=False))
            inner = F.gelu(block.mlp.fc1(block.norm2(x)), approximate="tanh")
            x = x + block.mlp.fc2(inner)
        return self.norm(x)


class Projector(nn.Module):
    """Squares of patches side by side, zeros at the right and below where they do not come out."""

    def __init__(self, p: dict[str, Any]) -> None:
        super().__init__()
        self.ratio, d = p["downsample_ratio"], p["n_embed"]
        inner = d * p["mlp_ratio"]
        parts: list[nn.Module] = [nn.Linear(p["input_dim"] * self.ratio**2, inner)]
        for _ in range(p["depth"] - 2):
            parts += [nn.GELU(), nn.Linear(inner, inner)]
        self.layers = nn.Sequential(*parts, nn.GELU(), nn.Linear(inner, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(views, patches, width) to (views, rows, columns, hidden)."""
        side, r = math.isqrt(x.shape[1]), self.ratio
        grid = x.unflatten(1, (side, side))
        missing = -side % r
        grid = F.pad(grid, (0, 0, 0, missing, 0, missing))
        cells = grid.unfold(1, r, r).unfold(2, r, r)  # (views, rows, columns, width, r, r)
        return self.layers(cells.flatten(3))


def swiglu(d: int, inner: int) -> Node:
    return Node(gate_proj=matrix(d, inner), up_proj=matrix(d, inner), down_proj=matrix(inner, d))


def run_swiglu(m: Node, x: torch.Tensor) -> torch.Tensor:
    return m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x))


def turn(x: torch.Tensor, base: float, neighbours: bool) -> torch.Tensor:
    """Rotary positions of (heads, tokens, width): by halves, or by neighbours taken apart first."""
    if neighbours:
        x = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    tokens, width = x.shape[-2:]
    angle = torch.arange(tokens)[:, None] / base ** (torch.arange(0, width, 2) / width)
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class LatentAttention(nn.Module):
    """Keys and values out of one narrow vector a token; one rotated key serves all heads."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
        nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
        self.c, queries = c, heads * (nope + rope)
        if c["q_lora_rank"]:
            self.q_a_proj = matrix(d, c["q_lora_rank"])
            self.q_a_layernorm = Norm(c["q_lora_rank"])
            self.q_b_proj = matrix(c["q_lora_rank"], queries)
        else:
            self.q_proj = matrix(d, queries)
        self.kv_a_proj_with_mqa = matrix(d, rank + rope)
        self.kv_a_layernorm = Norm(rank)
        self.kv_b_proj = matrix(rank, heads * (nope + value))
        self.o_proj = matrix(heads * value, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.c
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        if c["q_lora_rank"]:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        q = q.unflatten(-1, (heads, -1)).transpose(0, 1)
        narrow, shared = self.kv_a_proj_with_mqa(x).split((c["kv_lora_rank"], rope), -1)
        both = self.kv_b_proj(self.kv_a_layernorm(narrow)).unflatten(-1, (heads, -1))
        k, v = both.transpose(0, 1).split((nope, c["v_head_dim"]), -1)
        q = torch.cat((q[..., :nope], turn(q[..., nope:], c["rope_theta"], True)), -1)
        rotated = turn(shared[None], c["rope_theta"], True).expand(heads, -1, -1)
        return self.o_proj(attend(q, torch.cat((k, rotated), -1), v, causal=True))


class PlainAttention(nn.Module):
    """Llama's, which the authors take where `use_mla` is false."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d, heads = c["hidden_size"], c["num_attention_heads"]
        shared = c["num_key_value_heads"] or heads
        self.width, self.base = d // heads, c["rope_theta"]
        self.q_proj, self.o_proj = matrix(d, d), matrix(d, d)
        self.k_proj = matrix(d, shared * self.width)
        self.v_proj = matrix(d, shared * self.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            made(x).unflatten(-1, (-1, self.width)).transpose(0, 1)
            for made in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (turn(part, self.base, False) for part in (q, k))
        k, v = (part.repeat_interleave(len(q) // len(k), 0) for part in (k, v))
        return self.o_proj(attend(q, k, v, causal=True))


class Experts(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d, inner, count = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
        self.c = c
        self.gate = Node(weight=torch.zeros(count, d))
        if c["topk_method"] == "noaux_tc":
            self.gate.e_score_correction_bias = nn.Parameter(torch.zeros(count))
        self.experts = nn.ModuleList(swiglu(d, inner) for _ in range(count))
        if c["n_shared_experts"]:
            self.shared_experts = swiglu(d, inner * c["n_shared_experts"])

    def chosen(self, scores: torch.Tensor) -> torch.Tensor:
        """Each token's experts: the best, of the best groups where groups limit them."""
        method, groups = self.c["topk_method"], self.c.get("n_group")
        if method == "noaux_tc":
            scores = scores + self.gate.e_score_correction_bias
        elif method not in ("greedy", "group_limited_greedy"):
            raise ValueError(f"no such choice of experts: {method}")
        if method != "greedy":
            members = scores.unflatten(-1, (groups, -1))
            worth = members.topk(2)[0].sum(-1) if method == "noaux_tc" else members.amax(-1)
            best = worth.topk(self.c["topk_group"]).indices
            open_to = torch.zeros_like(worth).scatter(-1, best, 1.0)
            scores = (members * open_to[..., None]).flatten(-2)
        return scores.topk(self.c["num_experts_per_tok"]).indices

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        known = x @ self.gate.weight.T
        scores = known.sigmoid() if self.c["scoring_func"] == "sigmoid" else known.softmax(-1)
        picked = self.chosen(scores)
        shares = scores.gather(-1, picked)
        if self.c["norm_topk_prob"] and picked.shape[-1] > 1:
            shares = shares / (shares.sum(-1, keepdim=True) + 1e-20)
        shares = shares * self.c["routed_scaling_factor"]
        said = torch.stack([run_swiglu(expert, x) for expert in self.experts], 1)
        own = said.gather(1, picked[..., None].expand(-1, -1, x.shape[-1]))
        made = (own * shares[..., None]).sum(1)
        if self.c["n_shared_experts"]:
            made = made + run_swiglu(self.shared_experts, x)
        return made


def layer_of(c: dict[str, Any], i: int) -> Node:
    sparse = (
        c["n_routed_experts"] is not None
        and i >= c["first_k_dense_replace"]
        and i % c["moe_layer_freq"] == 0
    )
    d, eps = c["hidden_size"], c["rms_norm_eps"]
    return Node(
        input_layernorm=Norm(d, eps),
        self_attn=LatentAttention(c) if c["use_mla"] else PlainAttention(c),
        post_attention_layernorm=Norm(d, eps),
        mlp=Experts(c) if sparse else swiglu(d, c["intermediate_size"]),
    )


class DeepseekVL2(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        c = {**LANGUAGE, **config["language_config"]}
        if config["tile_tag"] != "2D" or c.get("rope_scaling") or c.get("attention_bias"):
            raise ValueError("no published checkpoint has this")
        d = c["hidden_size"]
        self.first = config.get("global_view_pos", "head") == "head"
        self.vision = Siglip({**VISION, **config["vision_config"]})
        self.projector = Projector({**PROJECTOR, **config["projector_config"]})
        self.image_newline = nn.Parameter(torch.zeros(d))
        self.view_seperator = nn.Parameter(torch.zeros(d))  # the authors' spelling
        self.language = Node(
            model=Node(
                embed_tokens=nn.Embedding(c["vocab_size"], d),
                layers=nn.ModuleList(layer_of(c, i) for i in range(c["num_hidden_layers"])),
                norm=Norm(d, c["rms_norm_eps"]),
            ),
            lm_head=matrix(d, c["vocab_size"]),
        )
        self.seen: tuple[Any, Any] = (None, None)  # the last pictures, and what they became

    def lines(self, grid: torch.Tensor) -> torch.Tensor:
        """(rows, columns, hidden) as tokens, each row with its end."""
        return torch.cat((grid, self.image_newline.expand(len(grid), 1, -1)), 1).flatten(0, 1)

    def pictures(self, inputs: dict[str, Any]) -> torch.Tensor:
        made = self.projector(self.vision(inputs["pixel_values"]))
        parts, at = [], 0
        for wide, high in inputs["grids"]:
            whole, tiles = made[at], made[at + 1 : at + 1 + wide * high]
            at += 1 + wide * high
            bands = tiles.unflatten(0, (high, wide)).transpose(1, 2)  # (high, rows, wide, columns)
            local = bands.flatten(2, 3).flatten(0, 1)
            both = [self.lines(whole), self.lines(local)]
            head, tail = both if self.first else both[::-1]
            parts += [head, self.view_seperator[None], tail]
        return torch.cat(parts)

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        ids, model = inputs["input_ids"][0], self.language.model
        x = model.embed_tokens(ids)
        if "pixel_values" in inputs:
            if self.seen[0] is not inputs["pixel_values"]:
                self.seen = (inputs["pixel_values"], self.pictures(inputs))
            places = (ids == inputs["image_id"]).nonzero().flatten()[: len(self.seen[1])]
            x = x.clone()
            x[places] = self.seen[1]
        for layer in model.layers:
            x = x + layer.self_attn(layer.input_layernorm(x))
            h = layer.post_attention_layernorm(x)
            x = x + (layer.mlp(h) if isinstance(layer.mlp, Experts) else run_swiglu(layer.mlp, h))
        return self.language.lm_head(model.norm(x))


def build(config: dict[str, Any]) -> nn.Module:
    return DeepseekVL2(config)


def best_size(image: Image.Image, sizes: list[list[int]]) -> tuple[int, int]:
    """The size that shows the most pixels of the picture; of equals the one with the least rest."""
    best, shown, rest = None, 0, math.inf
    for width, height in sizes:
        scale = min(width / image.width, height / image.height)
        useful = min(
            int(image.width * scale) * int(image.height * scale), image.width * image.height
        )
        wasted = width * height - useful
        if useful > shown or (useful == shown and wasted < rest):
            best, shown, rest = (width, height), useful, wasted
    if best is None:
        raise ValueError(f"a picture of {image.width}x{image.height} has nothing left")
    return best


def views_of(
    image: Image.Image, s: dict[str, Any], cropping: bool
) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """The whole, then the tiles; and the columns and rows of tiles."""
    side = s["candidate_resolutions"][0][0]
    mean, std = s.get("image_mean", (0.5,) * 3), s.get("image_std", (0.5,) * 3)
    grey = tuple(int(part * 255) for part in mean)
    image = image.convert("RGB")
    width, height = best_size(image, s["candidate_resolutions"]) if cropping else (side, side)
    large = ImageOps.pad(image, (width, height), color=grey)
    shown = [ImageOps.pad(image, (side, side), color=grey)]
    for top in range(0, height, side):
        for left in range(0, width, side):
            shown.append(large.crop((left, top, left + side, top + side)))
    levels = [torch.from_numpy(np.array(view)).permute(2, 0, 1) / 255 for view in shown]
    shades = [torch.tensor(shade).view(3, 1, 1) for shade in (mean, std)]
    return [(level - shades[0]) / shades[1] for level in levels], (width // side, height // side)


def encode(
    folder: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    audio: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The authors' conversation "deepseek": each turn is tokenised on its own, and so is what
    stands before, between and after its pictures; an answer ends with the end token.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = json.loads((folder / "tokenizer_config.json").read_text())
    s = json.loads((folder / "processor_config.json").read_text()) | options
    begin, end, image_id = (
        tokenizer.token_to_id(token)
        for token in (named["bos_token"], named["eos_token"], s.get("image_token", "<image>"))
    )
    views = [views_of(image, s, cropping=len(images) <= 2) for image in images]
    side = s["candidate_resolutions"][0][0] // s["patch_size"]
    side = math.ceil(side / s["downsample_ratio"])
    waiting = iter(views)
    ids = [begin]
    for message in messages:
        said = "".join(
            "<image>\n" if part["type"] == "image" else part["text"] for part in message["content"]
        ).strip()
        if message["role"] == "user":
            said = f"<|User|>: {said}\n\n<|Assistant|>:"
        for i, piece in enumerate(said.split("<image>")):
            if i:
                _, (wide, high) = next(waiting)
                ids += [image_id] * (side * (side + 1) + 1 + high * side * (wide * side + 1))
            ids += tokenizer.encode(piece, add_special_tokens=False).ids
        if message["role"] == "assistant":
            ids.append(end)
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "image_id": image_id}
    if views:
        inputs["pixel_values"] = torch.stack([view for shown, _ in views for view in shown])
        inputs["grids"] = [grid for _, grid in views]
    return inputs
