"""jina-vlm, after Jina AI's own files (configuration, blocks, modeling, image_processing and
processing `*_jvlm.py`), read beside mlx-vlm's jina_vlm, mlxcel's and OpenVINO GenAI's jvlm.

`hidden_states` of the tower are what each layer leaves and, after them, the post norm's: negative
`vit_layers` count from there (mlx-vlm and mlxcel do the same). Biases of queries, keys and values
are tensors of their own, present and added whatever the config says; mlx-vlm's conversion has fused
ones, and none in the text's layers. The gate of a gated layer is the second half.

As in Molmo, a row of -1 is put behind the crops' masks and not before them, so that the last crop
is told to be partly padding and the whole picture is not. The authors, mlxcel and OpenVINO do so;
mlx-vlm puts a row of 1 in front. The authors' masks become whole numbers when they are collated. A
crop of which every value is -1, which is black, has no features before the padding's are added.

The picture is resized twice: to whole patches within a count of pixels, in levels (or in values,
`resize_in_float32`), and then to the crops, in values. mlx-vlm uses Pillow's bicubic for both and
no pixel settings at all; OpenVINO has the second step alone, in levels. Where the crops' step is an
odd count of patches, the authors round each tile's part up to whole windows; so must the tokens.

The text begins with the beginning token, or the end's where the tokenizer has none; mlx-vlm has
none at all. The template sees `image_prompt_token` and `always_start_with_space`.
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

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class Rms(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()


def norm_of(settings: dict[str, Any] | None, size: int) -> nn.Module:
    settings = settings or {}
    eps = settings.get("eps") or 1e-5
    if settings.get("type", "default") == "rms":
        return Rms(size, eps)
    return nn.LayerNorm(size, eps=eps, bias=bool(settings.get("bias")))


def turned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotate (heads, tokens, dim) by the tokens' places."""
    half = x.shape[-1] // 2
    angle = torch.outer(torch.arange(x.shape[1]).float(), theta ** (-torch.arange(half) / half))
    real, imaginary = x[..., :half], x[..., half:]
    return torch.cat(
        (
            real * angle.cos() - imaginary * angle.sin(),
            imaginary * angle.cos() + real * angle.sin(),
        ),
        -1,
    )


class Attention(nn.Module):
    """Self-attention with one matrix, or of one thing to another with two."""

    def __init__(self, c: dict[str, Any], size: int, out: int, own: bool = True) -> None:
        super().__init__()
        heads = c.get("n_heads", 12)
        few = c.get("n_kv_heads") or heads
        dim = c.get("head_dim") or size // heads
        self.heads, self.few, self.dim, self.own = heads, few, dim, own
        if own:
            self.qkv_w = nn.Linear(size, (heads + 2 * few) * dim, bias=False)
        else:
            self.q_w = nn.Linear(size, heads * dim, bias=False)
            self.kv_w = nn.Linear(size, 2 * few * dim, bias=False)
        self.out = nn.Linear(heads * dim, out, bias=bool(c.get("o_bias")))
        self.q_b = nn.Parameter(torch.zeros(heads * dim))
        self.k_b = nn.Parameter(torch.zeros(few * dim))
        self.v_b = nn.Parameter(torch.zeros(few * dim))
        self.each = bool(c.get("qkv_lnorm_on_heads"))
        for name, count in (("q_lnorm", heads), ("k_lnorm", few), ("v_lnorm", few)):
            width = dim if self.each else count * dim
            setattr(
                self, name, norm_of(c.get("lnorm_config"), width) if c.get(name) else nn.Identity()
            )

    def forward(
        self,
        asking: torch.Tensor,
        asked: torch.Tensor | None = None,
        theta: float | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        """(..., tokens, size) to (..., tokens, out)."""
        if self.own:
            rows = self.heads * self.dim, self.few * self.dim, self.few * self.dim
            q, k, v = self.qkv_w(asking).split(rows, -1)
        else:
            q = self.q_w(asking)
            k, v = self.kv_w(asked).chunk(2, -1)
        parts = []
        for x, bias, norm, count in (
            (q, self.q_b, self.q_lnorm, self.heads),
            (k, self.k_b, self.k_lnorm, self.few),
            (v, self.v_b, self.v_lnorm, self.few),
        ):
            x = x + bias
            x = (
                norm(x.unflatten(-1, (count, -1)))
                if self.each
                else norm(x).unflatten(-1, (count, -1))
            )
            parts.append(x.transpose(-3, -2).repeat_interleave(self.heads // count, -3))
        q, k, v = parts
        if theta is not None:
            q, k = turned(q, theta), turned(k, theta)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.dim)
        if causal:
            later = torch.ones(scores.shape[-2:]).triu(1).bool()
            scores = scores.masked_fill(later, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, c: dict[str, Any], size: int, out: int) -> None:
        super().__init__()
        inner = c.get("size") or c.get("ratio", 4) * size
        self.act = ACTIVATIONS[c.get("activation_type", "silu")]
        self.gated = c.get("gated_activation", True)
        self.up = nn.Linear(size, inner * (2 if self.gated else 1), bias=bool(c.get("bias")))
        self.down = nn.Linear(inner, out, bias=bool(c.get("bias")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        if not self.gated:
            return self.down(self.act(x))
        x, gate = x.chunk(2, -1)
        return self.down(self.act(gate) * x)


class Block(nn.Module):
    def __init__(self, c: dict[str, Any], size: int) -> None:
        super().__init__()
        self.attn = Attention(c["attn_config"], size, size)
        self.ffn = FeedForward(c["ffn_config"], size, size)
        self.attn_lnorm = norm_of(c.get("lnorm_config"), size)
        self.ffn_lnorm = norm_of(c.get("lnorm_config"), size)

    def forward(self, x: torch.Tensor, **how: Any) -> torch.Tensor:
        x = x + self.attn(self.attn_lnorm(x), **how)
        return x + self.ffn(self.ffn_lnorm(x))


class Connector(nn.Module):
    def __init__(self, c: dict[str, Any], wide: int, inner: int, out: int) -> None:
        super().__init__()
        assert c["pooling_type"] == "attention_meanq"
        assert c["padding_embed_type"] == "pad_and_partial_pad"
        assert c["projector_type"] == "mlp"
        self.window = (c["pooling_h"], c["pooling_w"])
        self.pad_embed = nn.Parameter(torch.zeros(2, wide))
        self.pooling = Attention(c["attn_pooling_config"], wide, inner, own=False)
        self.projector = FeedForward(c["mlp_projector_config"], inner, out)

    def forward(self, x: torch.Tensor, masks: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(crops, patches, wide) to (crops, rows, columns, out)."""
        empty, partly = masks == 0, (masks < 1) & (masks != 0)
        x = x + empty[..., None] * self.pad_embed[0] + partly[..., None] * self.pad_embed[1]
        x = x.unflatten(1, grid)
        high, wide = self.window
        x = F.pad(x, (0, 0, 0, -grid[1] % wide, 0, -grid[0] % high))
        rows, columns = x.shape[1] // high, x.shape[2] // wide
        x = x.unflatten(2, (columns, wide)).unflatten(1, (rows, high))
        x = x.transpose(2, 3).flatten(3, 4)  # (crops, rows, columns, window, wide)
        pooled = self.pooling(x.mean(3, keepdim=True), x)
        return self.projector(pooled[..., 0, :])


class VisionModel(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        assert not c.get("use_cls_token", True)
        assert c.get("linear_patch_embedding", True)
        size, patch = c["hidden_size"], c["patch_size"]
        self.grid = (c["input_size"][0] // patch, c["input_size"][1] // patch)
        self.taken = c["vit_layers"]
        self.pos_embed = nn.Parameter(torch.zeros(self.grid[0] * self.grid[1], size))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Linear(
            c.get("n_channels", 3) * patch**2, size, bias=c.get("patch_embedding_bias", True)
        )
        blocks = c["block_config"]
        self.layers = nn.ModuleList(Block(blocks, size) for _ in range(c["n_layers"]))
        norms = blocks.get("lnorm_config")
        self.pre_lnorm = norm_of(norms, size) if c.get("pre_lnorm") else nn.Identity()
        self.post_lnorm = norm_of(norms, size) if c.get("post_lnorm") else nn.Identity()
        self.vl_connector = Connector(
            c["vl_connector_config"], size * len(self.taken), size, c["output_size"]
        )

    def forward(self, crops: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        x = self.pre_lnorm(self.patch_embed.proj(crops) + self.pos_embed)
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        states.append(self.post_lnorm(x))
        seen = (crops != -1).flatten(1).any(1)[:, None, None]
        features = torch.cat([states[i] for i in self.taken], -1) * seen
        return self.vl_connector(features, masks, self.grid)


class Embedding(nn.Module):
    def __init__(self, rows: int, more: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(rows, size))
        self.new_embedding = nn.Parameter(torch.zeros(more, size))


class TextModel(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        assert c["rope"]
        assert not c.get("rope_scaling")
        assert c.get("partial_rotary_factor", 1.0) == 1.0
        assert not c.get("normalize_input_embeds")
        size = c["hidden_size"]
        self.theta = c["rope_theta"]
        self.embedding = Embedding(
            c.get("embedding_size") or c["vocab_size"], c["additional_vocab_size"], size
        )
        self.ln_f = norm_of(c["block_config"].get("lnorm_config"), size)
        self.layers = nn.ModuleList(Block(c["block_config"], size) for _ in range(c["n_layers"]))


class JinaVlm(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        text = config["text_config"]
        self.model = nn.Module()
        self.model.vision_model = VisionModel(config["vision_config"])
        self.model.language_model = TextModel(text)
        self.tied = config.get("tie_word_embeddings", False)
        if not self.tied:
            rows = text.get("embedding_size") or text["vocab_size"]
            self.lm_head = nn.Linear(text["hidden_size"], rows, bias=False)
        self.seen: tuple[Any, Any] = (None, None)  # the last pictures, and what they became

    def pictures(self, views: list[dict[str, Any]]) -> torch.Tensor:
        """Of each picture the whole and then the crops, row by row as if they were one."""
        made = []
        for view in views:
            whole, *crops = self.model.vision_model(view["crops"], view["masks"])
            bands = []
            for i, (top, down) in enumerate(view["rows"]):
                band = [
                    crops[i * len(view["columns"]) + j][top : top + down, left : left + across]
                    for j, (left, across) in enumerate(view["columns"])
                ]
                bands.append(torch.cat(band, 1))
            made += [whole.flatten(0, 1), torch.cat(bands).flatten(0, 1)]
        return torch.cat(made)

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        ids, text = inputs["input_ids"][0], self.model.language_model
        x = torch.cat((text.embedding.embedding, text.embedding.new_embedding))[ids]
        if "views" in inputs:
            if self.seen[0] is not inputs["views"]:
                self.seen = (inputs["views"], self.pictures(inputs["views"]))
            places = (ids == inputs["patch_id"]).nonzero()[: len(self.seen[1]), 0]
            x = x.index_add(0, places, self.seen[1])
        for layer in text.layers:
            x = layer(x, theta=text.theta, causal=True)
        x = text.ln_f(x)
        return x @ text.embedding.embedding.T if self.tied else self.lm_head(x)


def build(config: dict[str, Any]) -> nn.Module:
    return JinaVlm(config)


def resized(x: torch.Tensor, size: tuple[int, int], s: dict[str, Any]) -> torch.Tensor:
    """(3, h, w), levels in uint8 or values from 0 to 1, to values at another size."""
    levels = not x.is_floating_point()
    if levels and s.get("resize_in_float32", True):
        x, levels = x.float() / 255, False
    if tuple(x.shape[1:]) != tuple(size):
        made = F.interpolate(
            x[None].float(),
            size,
            mode=s.get("interpolation", "bicubic"),
            align_corners=False,
            antialias=s.get("antialias", True),
        )[0]
        x = made.clamp(0, 255).round() if levels else made
    return (x.float() / 255 if levels else x).clamp(0, 1)


def whole_patches(height: int, width: int, s: dict[str, Any]) -> tuple[int, int]:
    """The nearest size in whole patches that holds neither too many pixels nor too few."""
    if max(height, width) / min(height, width) > 200:
        raise ValueError(f"{width}x{height} is too long")
    patch, least, most = s["patch_size"], s["min_pixels"], s["max_pixels"]
    high, wide = round(height / patch) * patch, round(width / patch) * patch
    if high * wide > most:
        shrink = math.sqrt(height * width / most)
        high = max(patch, math.floor(height / shrink / patch) * patch)
        wide = max(patch, math.floor(width / shrink / patch) * patch)
    elif high * wide < least:
        grow = math.sqrt(least / (height * width))
        high = math.ceil(height * grow / patch) * patch
        wide = math.ceil(width * grow / patch) * patch
    return high, wide


def tiling_of(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """The smallest tiling that needs no shrinking, else the one that needs the least."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    grids = sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0]))
    sides = np.array(grids, dtype=np.int32) * window
    with np.errstate(divide="ignore"):
        scales = sides.astype(np.float32) / np.stack([height, width], dtype=np.float32)
    scale = scales.min(-1)
    if (scale < 1).all():
        return grids[int(scale.argmax())]
    return grids[int(np.where(scale < 1, 10e9, scale).argmin())]


def patches_of(picture: torch.Tensor, size: int) -> torch.Tensor:
    """(3, h, w) to (patches, size * size * 3), channels last."""
    _, h, w = picture.shape
    cut = picture.view(3, h // size, size, w // size, size)
    return cut.permute(1, 3, 2, 4, 0).reshape(-1, size * size * 3)


def spans(count: int, patches: int, margins: tuple[int, int], window: int) -> list[tuple[int, int]]:
    """Of each tile along one side, the first pooled line that is kept, and how many."""
    before, after = margins
    found = []
    for i in range(count):
        kept = patches - before - after
        kept += before if i == 0 else 0
        kept += after if i == count - 1 else 0
        found.append((0 if i == 0 else before // window, math.ceil(kept / window)))
    return found


def view_of(image: Image.Image, s: dict[str, Any]) -> dict[str, Any]:
    assert s["cropping_method"] == "overlap-and-resize"
    assert not s.get("preserve_aspect_ratio", False)
    side, patch = s["base_input_size"][0], s["patch_size"]
    margins = tuple(s.get("overlap_margins", (4, 4)))
    border, patches = sum(margins) * patch, side // patch
    step = (patches - sum(margins)) * patch
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if s.get("do_resize", True):
        x = resized(x, whole_patches(*x.shape[1:], s), s)
    high, wide = tiling_of(x.shape[1] - border, x.shape[2] - border, step, s["max_crops"])

    def normal(picture: torch.Tensor) -> torch.Tensor:
        if s.get("normalization_method", "gaussian") == "minmax":
            low, top = s.get("image_min") or -1.0, s.get("image_max") or 1.0
            return low + picture * (top - low)
        mean, std = (torch.tensor(s[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        return (picture - mean) / std

    large = normal(resized(x, (high * step + border, wide * step + border), s))
    crops = [patches_of(normal(resized(x, (side, side), s)), patch)]
    for i in range(high):
        for j in range(wide):
            down, across = (slice(n * step, n * step + side) for n in (i, j))
            crops.append(patches_of(large[:, down, across], patch))
    masks = torch.ones(len(crops), patches**2, dtype=torch.int64)
    masks[-1] = -1
    return {
        "crops": torch.stack(crops),
        "masks": masks,
        "rows": spans(high, patches, margins, s.get("pooling_h", 2)),
        "columns": spans(wide, patches, margins, s.get("pooling_w", 2)),
        "base": (math.ceil(patches / s["pooling_h"]), math.ceil(patches / s["pooling_w"])),
    }


def encode(
    folder: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    audio: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | options
    processor = json.loads((folder / "processor_config.json").read_text())
    names = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        (folder / "chat_template.jinja").read_text()
    )
    text = template.render(
        messages=messages,
        add_generation_prompt=True,
        always_start_with_space=processor.get("always_start_with_space", False),
        image_prompt_token="<|image|>",
    )
    start, end, patch, column = (
        tokenizer.token_to_id(f"<im_{name}>") for name in ("start", "end", "patch", "col")
    )
    row_end = [column] if settings.get("use_column_tokens", True) else []
    views = [view_of(image, settings) for image in images]
    ids = [tokenizer.token_to_id(names.get("bos_token") or names["eos_token"])]
    waiting = iter(views)
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        if token != tokenizer.token_to_id("<|image|>"):
            ids.append(token)
            continue
        view = next(waiting)
        large = tuple(sum(kept for _, kept in view[name]) for name in ("rows", "columns"))
        for rows, columns in (view["base"], large):
            ids += [start, *([patch] * columns + row_end) * rows, end]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids]), "patch_id": patch}
    if views:
        inputs["views"] = views
        inputs["pixel_values"] = torch.cat([view["crops"] for view in views])
    return inputs
