"""Moondream 3, after the authors' repository (moondream/torch: image_crops, vision, text, region,
moondream) and vLLM's moondream3.py, which has what the preview adds: tau and the experts.

Where they differ: the repository rotates halves and writes them back interleaved, vLLM keeps the
halves; queries and keys are permuted alike, so the scores agree. The authors resize with pyvips if
it is there and with Pillow's Lanczos if not: this is the latter. The tokens of a picture have no
ids of their own: `<|md_reserved_7|>` (8), which no template uses, stands for them here. `templates`
are read from the config, where the tokenizer's ids differ from the published one's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import nn

STAND_IN = 8
TEXT = {
    "dim": 2048, "ff_dim": 8192, "n_layers": 24, "vocab_size": 51200, "n_heads": 32,
    "n_kv_heads": 32, "prefix_attn": 730, "rope_theta": 1500000.0,
    "moe": {
        "num_experts": 64, "start_layer": 4, "experts_per_token": 8, "expert_inner_dim": 1024
    },
}  # fmt: skip
VISION = {
    "enc_dim": 1152, "enc_patch_size": 14, "enc_n_layers": 27, "enc_ff_dim": 4304,
    "enc_n_heads": 16, "proj_out_dim": 2048, "crop_size": 378, "in_channels": 3, "max_crops": 12,
    "overlap_margin": 4, "proj_inner_dim": 8192,
}  # fmt: skip
REGION = {
    "dim": 2048, "coord_feat_dim": 256, "coord_out_dim": 1024, "size_feat_dim": 512,
    "size_out_dim": 2048,
}  # fmt: skip
TOKENS = {
    "bos_id": 0, "eos_id": 0, "answer_id": 3, "thinking_id": 4, "coord_id": 5, "size_id": 6,
    "templates": {
        "caption": {
            "short": [1, 32708, 2, 12492, 3], "normal": [1, 32708, 2, 6382, 3],
            "long": [1, 32708, 2, 4059, 3],
        },
        "query": {"prefix": [1, 15381, 2], "suffix": [3]},
        "detect": {"prefix": [1, 7235, 476, 2], "suffix": [3]},
        "point": {"prefix": [1, 2581, 2], "suffix": [3]},
    },
}  # fmt: skip


def parts(config: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The published config.json holds all of it under "config", often empty."""
    given = config.get("config") or {}
    text = {**TEXT, **given.get("text", {})}
    text["moe"] = {**TEXT["moe"], **(text["moe"] or {})}
    return (
        text,
        {**VISION, **given.get("vision", {})},
        {**REGION, **given.get("region", {})},
        {**TOKENS, **given.get("tokenizer", {})},
    )


class Table(nn.Module):
    """A namespace of modules and parameters."""

    def __init__(self, **things: Any) -> None:
        super().__init__()
        for name, thing in things.items():
            setattr(self, name, nn.Parameter(thing) if isinstance(thing, torch.Tensor) else thing)


def mlp_of(d: int, inner: int, out: int) -> Table:
    return Table(fc1=nn.Linear(d, inner), fc2=nn.Linear(inner, out))


def run_mlp(x: torch.Tensor, m: Table) -> torch.Tensor:
    return m.fc2(F.gelu(m.fc1(x), approximate="tanh"))


def text_tree(c: dict[str, Any]) -> Table:
    d, heads = c["dim"], c["n_heads"]
    wide = d + 2 * d * c["n_kv_heads"] // heads
    e, inner = c["moe"]["num_experts"], c["moe"]["expert_inner_dim"]

    def block(i: int) -> Table:
        tau = Table(
            wq=torch.zeros(heads, wide), wv=torch.zeros(heads, wide), alpha=torch.zeros(heads)
        )
        attention = Table(qkv=nn.Linear(d, wide), proj=nn.Linear(d, d), tau=tau)
        if i < c["moe"]["start_layer"]:
            mlp = mlp_of(d, c["ff_dim"], d)
        else:
            mlp = Table(
                router=nn.Linear(d, e),
                fc1=Table(weight=torch.zeros(e, 2 * inner, d)),
                fc2=Table(weight=torch.zeros(e, d, inner)),
            )
        return Table(ln=nn.LayerNorm(d), attn=attention, mlp=mlp)

    return Table(
        wte=torch.zeros(c["vocab_size"], d),
        blocks=nn.ModuleList(block(i) for i in range(c["n_layers"])),
        post_ln=nn.LayerNorm(d),
        lm_head=nn.Linear(d, c["vocab_size"]),
    )


def vision_tree(c: dict[str, Any]) -> Table:
    d, size = c["enc_dim"], c["enc_patch_size"]
    return Table(
        patch_emb=nn.Linear(size * size * c["in_channels"], d),
        pos_emb=torch.zeros(1, (c["crop_size"] // size) ** 2, d),
        blocks=nn.ModuleList(
            Table(
                ln1=nn.LayerNorm(d),
                attn=Table(qkv=nn.Linear(d, 3 * d), proj=nn.Linear(d, d)),
                ln2=nn.LayerNorm(d),
                mlp=mlp_of(d, c["enc_ff_dim"], d),
            )
            for _ in range(c["enc_n_layers"])
        ),
        post_ln=nn.LayerNorm(d),
        proj_mlp=mlp_of(2 * d, c["proj_inner_dim"], c["proj_out_dim"]),
    )


def region_tree(c: dict[str, Any]) -> Table:
    return Table(
        coord_features=torch.zeros(1, c["coord_feat_dim"] // 2),
        coord_encoder=nn.Linear(c["coord_feat_dim"], c["dim"]),
        coord_decoder=nn.Linear(c["dim"], c["coord_out_dim"]),
        size_features=torch.zeros(2, c["size_feat_dim"] // 2),
        size_encoder=nn.Linear(c["size_feat_dim"], c["dim"]),
        size_decoder=nn.Linear(c["dim"], c["size_out_dim"]),
        **({"ln": nn.LayerNorm(c["dim"])} if c.get("ln") else {}),
    )


def experts(x: torch.Tensor, m: Table, top: int) -> torch.Tensor:
    best, which = m.router(x).topk(top, dim=-1)
    share = best.softmax(-1)
    h, g = torch.einsum("tkod,td->tko", m.fc1.weight[which], x).chunk(2, -1)
    each = torch.einsum("tkdo,tko->tkd", m.fc2.weight[which], F.gelu(h) * (g + 1))
    return (share[..., None] * each).sum(1)


class Moondream3(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.text_config, self.vision_config, region, self.tokens = parts(config)
        self.model = Table(
            text=text_tree(self.text_config),
            vision=vision_tree(self.vision_config),
            region=region_tree(region),
        )
        self.seen: tuple[Any, Any] = (None, None)  # the last picture, and what it became

    # The picture.

    def crops_to_features(self, crops: torch.Tensor) -> torch.Tensor:
        c, v = self.vision_config, self.model.vision
        n, size, heads = len(crops), c["enc_patch_size"], c["enc_n_heads"]
        x = crops.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
        x = v.patch_emb(x.reshape(n, -1, size * size * c["in_channels"])) + v.pos_emb
        for block in v.blocks:
            qkv = block.attn.qkv(block.ln1(x)).view(n, x.shape[1], 3, heads, -1)
            q, k, w = qkv.permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
            x = x + block.attn.proj((scores @ w).transpose(1, 2).flatten(2))
            x = x + run_mlp(block.ln2(x), block.mlp)
        return v.post_ln(x)

    def picture(self, crops: torch.Tensor, tiling: tuple[int, int]) -> torch.Tensor:
        c = self.vision_config
        features = self.crops_to_features(crops)
        side, margin, d = c["crop_size"] // c["enc_patch_size"], c["overlap_margin"], c["enc_dim"]
        local = features[1:].view(*tiling, side, side, d)
        high, wide = tiling
        bands = []
        for i in range(high):
            top, bottom = (0 if i == 0 else margin), (side if i == high - 1 else side - margin)
            pieces = []
            for j in range(wide):
                left, right = (0 if j == 0 else margin), (side if j == wide - 1 else side - margin)
                pieces.append(local[i, j, top:bottom, left:right])
            bands.append(torch.cat(pieces, 1))
        whole = torch.cat(bands, 0).permute(2, 0, 1)[None]
        pooled = F.adaptive_avg_pool2d(whole, (side, side))[0].permute(1, 2, 0).reshape(-1, d)
        return run_mlp(torch.cat((features[0], pooled), -1), self.model.vision.proj_mlp)

    # The text.

    def attention(self, x: torch.Tensor, a: Table, mask: torch.Tensor) -> torch.Tensor:
        c, t = self.text_config, len(x)
        heads, kv = c["n_heads"], c["n_kv_heads"]
        dim = c["dim"] // heads
        qkv = a.qkv(x)
        q, k, v = qkv.split([heads * dim, kv * dim, kv * dim], -1)
        q, k, v = q.view(t, heads, dim), k.view(t, kv, dim), v.view(t, kv, dim)
        position = torch.arange(t).float()
        by_place = 1 + (torch.sigmoid(a.tau.alpha * (position + 1).log()[:, None]) - 0.5)
        heard = F.gelu(qkv)
        q = q * (torch.tanh(heard @ a.tau.wq.T) + by_place)[..., None]
        v = v * (torch.tanh(heard @ a.tau.wv.T) + by_place)[:, :kv, None]
        turned = dim // 2
        frequency = c["rope_theta"] ** -(torch.arange(0, turned, 2).float() / turned)
        angle = torch.polar(torch.ones(t, 1, turned // 2), position[:, None, None] * frequency)

        def rope(p: torch.Tensor) -> torch.Tensor:
            first, second = p[..., : turned // 2], p[..., turned // 2 : turned]
            spun = torch.view_as_real(torch.complex(first, second) * angle).flatten(-2)
            return torch.cat((spun, p[..., turned:]), -1)

        q, k = rope(q).transpose(0, 1), rope(k).transpose(0, 1)
        k, v = (p.repeat_interleave(heads // kv, 0) for p in (k, v.transpose(0, 1)))
        scores = (q @ k.transpose(1, 2) / math.sqrt(dim)).masked_fill(~mask, -math.inf)
        return a.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def hidden(self, embeds: torch.Tensor, prefix: int) -> torch.Tensor:
        """The stream after the last block; the first `prefix` tokens see each other."""
        c, x = self.text_config, embeds
        mask = torch.ones(len(x), len(x)).tril().bool()
        mask[:prefix, :prefix] = True
        for i, block in enumerate(self.model.text.blocks):
            normed = block.ln(x)
            if i < c["moe"]["start_layer"]:
                mlp = run_mlp(normed, block.mlp)
            else:
                mlp = experts(normed, block.mlp, c["moe"]["experts_per_token"])
            x = x + self.attention(normed, block.attn, mask) + mlp
        return x

    def embeds(self, inputs: dict[str, Any]) -> torch.Tensor:
        ids = inputs["input_ids"][0]
        x = self.model.text.wte[ids]
        if "pixel_values" in inputs:
            if self.seen[0] is not inputs["pixel_values"]:
                features = self.picture(inputs["pixel_values"], inputs["tiling"])
                self.seen = (inputs["pixel_values"], features)
            x = x.clone()
            x[1 : 1 + len(self.seen[1])] = self.seen[1]
        return x

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        prefix = self.text_config["prefix_attn"] if "pixel_values" in inputs else 0
        text = self.model.text
        return text.lm_head(text.post_ln(self.hidden(self.embeds(inputs), prefix)))

    # Boxes and points.

    @torch.no_grad()
    def places(
        self, inputs: dict[str, Any], *, boxes: bool, most: int = 150
    ) -> list[dict[str, float]]:
        """What detect and point give: shares of the picture's sides.

        A coordinate's bin is argmax / 1024; a size's is 2 ** (bin / 1023 * 10 - 10). The region
        head reads the stream after the last block, before `post_ln`: so do the authors' repository
        (of Moondream 2) and a port of 3 to Transformers. Those and the authors' engine for 3 have
        no norm in the head; vLLM has one, `region.ln`, behind `post_ln`. Here a head has the norm
        where the config of the test says so ("ln").
        """
        text, region = self.model.text, self.model.region
        prefix = self.text_config["prefix_attn"] if "pixel_values" in inputs else 0
        x = self.embeds(inputs)
        found: list[dict[str, float]] = []

        def last() -> torch.Tensor:
            return self.hidden(x, prefix)[-1:]

        def heard() -> torch.Tensor:
            return region.ln(last()) if hasattr(region, "ln") else last()

        def fourier(values: list[float], table: torch.Tensor) -> torch.Tensor:
            f = 2 * math.pi * torch.tensor([values]) @ table
            return torch.cat((f.cos(), f.sin()), -1)

        while len(found) < most:
            if int(text.lm_head(text.post_ln(last())).argmax()) == self.tokens["eos_id"]:
                break
            centre = []
            for _ in range(2):
                bins = region.coord_decoder(heard())
                centre.append(float(bins.argmax()) / bins.shape[-1])
                made = region.coord_encoder(fourier(centre[-1:], region.coord_features))
                x = torch.cat((x, made))
            if not boxes:
                found.append({"x": centre[0], "y": centre[1]})
                continue
            bins = region.size_decoder(heard()).view(2, -1).argmax(-1).float()
            w, h = (2.0 ** (bins / 1023 * 10 - 10)).tolist()
            x = torch.cat((x, region.size_encoder(fourier([w, h], region.size_features))))
            found.append(
                {
                    "x_min": centre[0] - w / 2, "y_min": centre[1] - h / 2,
                    "x_max": centre[0] + w / 2, "y_max": centre[1] + h / 2,
                }
            )  # fmt: skip
        return found


def build(config: dict[str, Any]) -> nn.Module:
    return Moondream3(config)


def tiling_of(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    if height <= window or width <= window:
        return 1, 1
    low_h, low_w = math.ceil(height / window), math.ceil(width / window)
    if low_h * low_w > most:
        ratio = math.sqrt(most / (low_h * low_w))
        return max(1, math.floor(low_h * ratio)), max(1, math.floor(low_w * ratio))
    high = max(math.floor(math.sqrt(most * height / width)), low_h)
    wide = max(math.floor(math.sqrt(most * width / height)), low_w)
    if high * wide > most:
        if wide > high:
            wide = math.floor(most / high)
        else:
            high = math.floor(most / wide)
    return max(1, high), max(1, wide)


def crops_of(image: Image.Image, c: dict[str, Any]) -> tuple[torch.Tensor, tuple[int, int]]:
    size, side = c["enc_patch_size"], c["crop_size"]
    margin = 2 * size * c["overlap_margin"]
    window = side - margin
    image = image.convert("RGB")
    tiling = tiling_of(image.height - margin, image.width - margin, window, c["max_crops"])
    lanczos = Image.Resampling.LANCZOS
    large = np.asarray(
        image.resize((tiling[1] * window + margin, tiling[0] * window + margin), lanczos)
    )
    crops = [np.asarray(image.resize((side, side), lanczos))]
    for i in range(tiling[0]):
        for j in range(tiling[1]):
            crops.append(large[i * window : i * window + side, j * window : j * window + side])
    x = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float()
    return (x / 255 - 0.5) / 0.5, tiling


def encode(
    folder: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    audio: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """`query` with the words of the last message; at most one picture, right after the start."""
    config = json.loads((folder / "config.json").read_text())
    _, vision, _, tokens = parts(config)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
    template = tokens["templates"]["query"]
    question = tokenizer.encode(words, add_special_tokens=False).ids
    ids = [*template["prefix"], *question, *template["suffix"]]
    inputs: dict[str, Any] = {}
    picture: list[int] = []
    if images:
        inputs["pixel_values"], inputs["tiling"] = crops_of(images[0], vision | options)
        picture = [STAND_IN] * (vision["crop_size"] // vision["enc_patch_size"]) ** 2
    inputs["input_ids"] = torch.tensor([[tokens["bos_id"], *picture, *ids]])
    return inputs
