"""MolmoPoint, after Ai2's modeling_molmo_point.py, modeling_molmo2.py and
image_processing_molmo2.py, read beside mlx-vlm's port and Transformers' Molmo2.

What the sources do where one would not expect it, or differ:
- All tokens of all pictures (row ends and frames included) see each other, whichever picture they
  are of. mlx-vlm makes the mask for it and does not use it.
- Points have tokens beyond the vocabulary, as many as the request has patches: each pooled patch,
  "no more points", the patches pooled in one, and nine places. A patch takes the logit of
  `<|token_index|>`, and only the likeliest one does; right after the prompt there is none yet.
- The patches' logits are divided by the root of how many there are: only their order counts.
- A patch's query turns by the place of the patch before it, but by nothing before the first.
- The authors' forward fails without a picture; here text alone has no points.
- mlx-vlm resizes 0-1 values; the authors, in torchvision, levels, without antialiasing, rounded.
The head's new rows are always 128 with the authors, here `additional_vocab_size`.
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

IMAGE_TOKENS = (
    "<im_patch>", "<im_low>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>",
    "<frame_start>", "<frame_end>",
)  # fmt: skip


class Group(nn.Module):
    """Modules and parameters by name."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)


class Rms(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def turned(x: torch.Tensor, places: torch.Tensor, theta: float) -> torch.Tensor:
    """Rope over the last axis; `places` fits the axis before it."""
    half = x.shape[-1] // 2
    angle = places.float()[..., None] / theta ** (torch.arange(half).float() / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def attend(a: Group, heads: int, q: torch.Tensor, kv: torch.Tensor, mask: Any) -> torch.Tensor:
    """(n, few, d) to (n, many, d), before any output layer."""
    q, k, v = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (a.wq(q), a.wk(kv), a.wv(kv))
    )
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def vit(v: dict[str, Any], layers: int) -> Group:
    d, inner, eps = v["hidden_size"], v["intermediate_size"], v["layer_norm_eps"]
    return Group(
        patch_embedding=nn.Linear(3 * v["image_patch_size"] ** 2, d),
        positional_embedding=torch.zeros(v["image_num_pos"], d),
        transformer=Group(
            resblocks=nn.ModuleList(
                Group(
                    attention=Group(
                        wq=nn.Linear(d, d), wk=nn.Linear(d, d), wv=nn.Linear(d, d),
                        wo=nn.Linear(d, d),
                    ),
                    feed_forward=Group(w1=nn.Linear(d, inner), w2=nn.Linear(inner, d)),
                    attention_norm=nn.LayerNorm(d, eps=eps),
                    ffn_norm=nn.LayerNorm(d, eps=eps),
                )
                for _ in range(layers)
            )
        ),
    )  # fmt: skip


def text_block(t: dict[str, Any]) -> Group:
    d, dim, eps = t["hidden_size"], t["head_dim"], t["layer_norm_eps"]
    heads, kv, inner = t["num_attention_heads"], t["num_key_value_heads"], t["intermediate_size"]
    assert t["qk_norm_type"] == "qwen3"
    assert not t["norm_after"]
    return Group(
        self_attn=Group(
            att_proj=nn.Linear(d, (heads + 2 * kv) * dim, bias=t["qkv_bias"]),
            attn_out=nn.Linear(heads * dim, d, bias=False),
            q_norm=Rms(dim, eps),
            k_norm=Rms(dim, eps),
        ),
        mlp=Group(
            ff_proj=nn.Linear(d, 2 * inner, bias=False), ff_out=nn.Linear(inner, d, bias=False)
        ),
        attn_norm=Rms(d, eps),
        ff_norm=Rms(d, eps),
    )


class MolmoPoint(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c, self.t, self.v, self.a = (
            c, c["text_config"], c["vit_config"], c["adapter_config"],
        )  # fmt: skip
        t, v, a = self.t, self.v, self.a
        d, wide, eps = t["hidden_size"], a["hidden_size"], t["layer_norm_eps"]
        self.chosen = [i if i >= 0 else v["num_hidden_layers"] + i for i in a["vit_layers"]]
        both, keys = v["hidden_size"] * len(self.chosen), c["patch_embed_dim"]
        assert not a.get("positional_embeddings")
        assert not a.get("attention_pooling_out_layer")
        assert c["no_more_points_class"]
        assert c["patch_location"] == "3x3"
        rows, more = t["vocab_size"], t["additional_vocab_size"]
        self.words = rows + more
        self.model = Group(
            transformer=Group(
                wte=Group(embedding=torch.zeros(rows, d), new_embedding=torch.zeros(more, d)),
                blocks=nn.ModuleList(text_block(t) for _ in range(t["num_hidden_layers"])),
                ln_f=Rms(d, eps),
            ),
            vit=vit(v, max(self.chosen) + 1),
            connector=Group(
                image_pooling_2d=Group(
                    wq=nn.Linear(both, wide), wk=nn.Linear(both, wide), wv=nn.Linear(both, wide)
                ),
                image_projector=Group(
                    w1=nn.Linear(wide, a["intermediate_size"], bias=False),
                    w2=nn.Linear(a["intermediate_size"], d, bias=False),
                    w3=nn.Linear(wide, a["intermediate_size"], bias=False),
                ),
            ),
            build_vit_embedding=nn.Linear(both, d),
            point_predictor=Group(
                x_norm=Rms(d, eps),
                patch_q=nn.Linear(d, keys),
                patch_k=nn.Linear(d, keys),
                subpatch_q=nn.Linear(d, keys),
                subpatch_k=nn.Linear(both, keys),
                add_no_point_class_embed=Group(vector=torch.zeros(keys)),
                subpatch_loc_k=nn.Linear(d, 9),
            ),
        )
        self.lm_head = Group(
            output_embeddings=torch.zeros(rows, d), new_output_embeddings=torch.zeros(more, d)
        )
        self.seen: tuple[Any, Any, Any] = (None, None, None)

    # Pictures.

    def pictures(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """What each pooled patch adds to its token, and the features pooled in it."""
        m, heads = self.model, self.v["num_attention_heads"]
        x = m.vit.patch_embedding(inputs["pixel_values"]) + m.vit.positional_embedding
        states = []
        for block in m.vit.transformer.resblocks:
            h = block.attention_norm(x)
            x = x + block.attention.wo(attend(block.attention, heads, h, h, None))
            h = block.feed_forward.w1(block.ffn_norm(x))
            x = x + block.feed_forward.w2(F.gelu(h, approximate="tanh"))
            states.append(x)
        features = torch.cat([states[i] for i in self.chosen], -1).flatten(0, 1)
        pooling = inputs["pooling"]
        there = pooling >= 0
        parts = features[pooling.clamp(min=0)] * there[..., None]
        query = parts.sum(1, keepdim=True) / there.sum(1)[:, None, None]
        mask = there if self.a["pooling_attention_mask"] else None
        pool, p = m.connector.image_pooling_2d, m.connector.image_projector
        x = attend(pool, self.a["num_attention_heads"], query, parts, mask)[:, 0]
        return p.w2(F.silu(p.w1(x)) * p.w3(x)), parts

    # Text.

    def attention(self, a: Group, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        t, n = self.t, len(x)
        heads, kv, dim = t["num_attention_heads"], t["num_key_value_heads"], t["head_dim"]
        q, k, v = a.att_proj(x).view(n, -1, dim).transpose(0, 1).split((heads, kv, kv))
        places = torch.arange(n)
        q, k = (turned(norm(p), places, t["rope_theta"])
                for p, norm in ((q, a.q_norm), (k, a.k_norm)))  # fmt: skip
        k, v = (p.repeat_interleave(heads // kv, 0) for p in (k, v))
        scores = (q @ k.transpose(1, 2) / math.sqrt(dim)).masked_fill(~mask, -math.inf)
        return a.attn_out((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))

    def embeds(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Tokens beyond the vocabulary are one of three words, and what they point to."""
        c, ids = self.c, inputs["input_ids"][0]
        wte = self.model.transformer.wte
        table = torch.cat((wte.embedding, wte.new_embedding))
        if "pixel_values" not in inputs:
            return table[ids]
        if self.seen[0] is not inputs["pixel_values"]:
            self.seen = (inputs["pixel_values"], *self.pictures(inputs))
        _, added, parts = self.seen
        patches, within = parts.shape[:2]
        places = inputs["places"]
        rows, last = [], None
        for token in ids.tolist():
            point = token - self.words
            if point < 0:
                rows.append(table[token])
            elif point <= patches:
                row = table[c["patch_token_id"]]
                if point < patches:
                    row, last = row + added[point], point
                rows.append(row)
            elif point <= patches + within:
                chosen = parts[last, point - patches - 1]
                rows.append(self.model.build_vit_embedding(chosen))
            else:
                rows.append(table[c["location_token_id"]])
        x = torch.stack(rows)
        x[places] = x[places] + added
        return x

    def hidden(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The stream after the last block, before its norm."""
        x = self.embeds(inputs)
        kind = F.pad(inputs["of_picture"], (0, len(x) - len(inputs["of_picture"])))
        mask = torch.ones(len(x), len(x)).tril().bool() | (kind[:, None] & kind[None])
        for block in self.model.transformer.blocks:
            x = x + self.attention(block.self_attn, block.attn_norm(x), mask)
            h, gate = block.mlp.ff_proj(block.ff_norm(x)).chunk(2, -1)
            x = x + block.mlp.ff_out(F.silu(gate) * h)
        return x

    def words_of(self, hidden: torch.Tensor) -> torch.Tensor:
        head = torch.cat((self.lm_head.output_embeddings, self.lm_head.new_output_embeddings))
        return self.model.transformer.ln_f(hidden) @ head.T

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The vocabulary's logits as they are; `next_token` says what is made of them."""
        return self.words_of(self.hidden(inputs))

    # Points.

    def scores(self, inputs: dict[str, Any], prompt: int) -> torch.Tensor:
        """What may follow, the tokens beyond the vocabulary included."""
        c, hidden, p = self.c, self.hidden(inputs), self.model.point_predictor
        words = self.words_of(hidden[-1:])[0]
        if "pixel_values" not in inputs:
            return words
        parts = self.seen[2]
        patches, within = parts.shape[:2]
        no_more, subs = self.words + patches, self.words + patches + 1
        spots = subs + within
        point = words[c["patch_token_id"]].clone()
        for name in ("patch_token_id", "subpatch_token_id", "location_token_id"):
            words[c[name]] = -100000.0
        beyond = torch.full((patches + 1 + within + 9,), -100000.0)
        ids = inputs["input_ids"][0].tolist()
        said = ids[prompt:]
        if said:
            # The patch before the last token, which itself does not count yet.
            before = [i - self.words for i in said[:-1] if self.words <= i < no_more]
            normed = p.x_norm(hidden)
            keys = turned(p.patch_k(normed[inputs["places"]]), inputs["order"], self.theta)
            keys = torch.cat((keys, p.add_no_point_class_embed.vector[None]))
            place = inputs["order"][before[-1]].clamp(min=0) if before else torch.tensor(0)
            asked = turned(p.patch_q(normed[-1:]), place[None], self.theta)[0]
            open_to = torch.cat((inputs["indexable"], torch.ones(1).bool()))
            best = (keys @ asked).masked_fill(~open_to, -math.inf).argmax()
            beyond[best] = point
            if self.words <= said[-1] < no_more:
                patch = said[-1] - self.words
                found = p.subpatch_k(parts[patch]) @ p.subpatch_q(normed[-1])
                found = found / math.sqrt(keys.shape[-1])
                found = found.masked_fill(inputs["pooling"][patch] < 0, -100000.0)
                beyond[patches + 1 : patches + 1 + within] = found
            if subs <= said[-1] < spots:
                beyond[-9:] = p.subpatch_loc_k(hidden[-1])
        return self.ordered(torch.cat((words, beyond)), ids, no_more, subs, spots)

    @property
    def theta(self) -> float:
        assert self.c["token_prediction_rotary"] == "one_d"
        return float(self.c["token_prediction_rotary_theta"])

    def ordered(
        self, scores: torch.Tensor, ids: list[int], no_more: int, subs: int, spots: int
    ) -> torch.Tensor:
        """Patch, part, place; and, as the config asks, points from the first patch to the last."""
        c, first, last = self.c, self.words, ids[-1]
        sorted_patches = c["mask_patches"] in ("always", "inference")
        sorted_parts = c["mask_subpatches"] in ("always", "inference")
        once = c["mask_repeats"] in ("all", "inference")
        patches = [i for i in ids[:-2] if first <= i < subs]
        parts = [i for i in ids[:-2] if subs <= i < spots]
        if no_more in ids:
            scores[first:] = -math.inf
        elif last < first or last >= spots:
            scores[subs:] = -math.inf
            if sorted_patches and patches:
                scores[first : patches[-1]] = -math.inf
            if once and sorted_parts and parts and parts[-1] == spots - 1:
                scores[patches[-1]] = -math.inf
        elif last < subs:
            scores[:subs] = -math.inf
            scores[spots:] = -math.inf
            if sorted_parts and patches and patches[-1] == last:
                scores[subs : parts[-1] + int(once)] = -math.inf
        else:
            scores[:spots] = -math.inf
        return scores

    def next_token(self, inputs: dict[str, Any], prompt: int) -> int:
        """The likeliest token after a sequence whose first `prompt` tokens were given."""
        return int(self.scores(inputs, prompt).argmax())


def build(config: dict[str, Any]) -> nn.Module:
    return MolmoPoint(config)


def tiling_of(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """The smallest tiling that needs no shrinking, else the one that needs the least."""
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    sizes = np.array(grids, dtype=np.float32) * np.float32(window)
    with np.errstate(divide="ignore"):
        scale = np.min(sizes / np.array([height, width], dtype=np.float32), axis=1)
    if np.all(scale < 1):
        return grids[int(np.argmax(scale))]
    return grids[int(np.argmin(np.where(scale < 1, 10e9, scale)))]


def squeezed(levels: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """Levels (3, h, w) at another size, as values about 0."""
    if levels.shape[1:] != (high, wide):
        levels = F.interpolate(levels[None], (high, wide), mode="bilinear")[0].round()
    return (levels / 255 - 0.5) / 0.5


def patches_of(picture: torch.Tensor, size: int) -> torch.Tensor:
    """(3, h, w) to (patches, size * size * 3)."""
    cut = picture.unfold(1, size, size).unfold(2, size, size)
    return cut.permute(1, 2, 3, 4, 0).flatten(2).flatten(0, 1)


def pooled(index: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """Blocks of a grid of indices, filled up with -1 around it: (rows, columns, block)."""
    rows, columns = -index.shape[0] % high, -index.shape[1] % wide
    around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    index = F.pad(index, around, value=-1)
    return index.unfold(0, high, high).unfold(1, wide, wide).flatten(2)


def crops_of(image: Image.Image, s: dict[str, Any]) -> dict[str, Any]:
    side, size, (left, right) = s["size"]["height"], s["patch_size"], s["overlap_margins"]
    levels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
    margin, across = (left + right) * size, side // size
    window = side - margin
    high, wide = tiling_of(
        levels.shape[1] - margin, levels.shape[2] - margin, window, s["max_crops"]
    )
    large = squeezed(levels, high * window + margin, wide * window + margin)
    crops = [patches_of(squeezed(levels, side, side), size)]
    index = torch.arange(across * across).view(across, across)
    bands = []
    for i in range(high):
        band = []
        for j in range(wide):
            down, along = (slice(n * window, n * window + side) for n in (i, j))
            band.append(
                (index + len(crops) * across * across)[
                    (left if i else 0) : (across if i == high - 1 else across - right),
                    (left if j else 0) : (across if j == wide - 1 else across - right),
                ]
            )
            crops.append(patches_of(large[:, down, along], size))
        bands.append(torch.cat(band, 1))
    low, fine = (pooled(part, *s["pooling_size"]) for part in (index, torch.cat(bands)))
    return {
        "crops": torch.stack(crops),
        "pooling": torch.cat((low.flatten(0, 1), fine.flatten(0, 1))),
        "grids": (low.shape[:2], fine.shape[:2]),
    }


def picture_text(made: dict[str, Any], processor: dict[str, Any]) -> str:
    """The whole, small, then the crops together with an end of each row."""
    (low_rows, low_columns), (rows, columns) = made["grids"]
    end = "<im_col>" if processor.get("image_use_col_tokens", True) else ""
    low_end = end if processor.get("use_single_crop_col_tokens", False) else ""
    start = "<low_res_im_start>" if processor.get("use_single_crop_start_token", True) else None
    small = "<im_low>" if processor.get("use_low_res_token_for_global_crops", True) else None
    low_row = (small or "<im_patch>") * low_columns + low_end
    row = "<im_patch>" * columns + end
    return f"{start or '<im_start>'}{low_row * low_rows}<im_end><im_start>{row * rows}<im_end>"


def encode(
    folder: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    audio: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """A beginning, whether or not the template writes one, then the template's text, in which all
    pictures come first.
    """
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | options
    processor = json.loads((folder / "processor_config.json").read_text())
    named = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    ).from_string((folder / "chat_template.jinja").read_text())
    text = template.render(messages=messages, add_generation_prompt=True)
    made = [crops_of(image, settings) for image in images]
    for one in made:
        text = text.replace("<|image|>", picture_text(one, processor), 1)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    start = tokenizer.token_to_id(named.get("bos_token") or named["eos_token"])
    ids = ids if ids[:1] == [start] else [start, *ids]
    row = torch.tensor(ids)
    kinds = torch.tensor([tokenizer.token_to_id(token) for token in IMAGE_TOKENS])
    inputs: dict[str, Any] = {"input_ids": row[None], "of_picture": torch.isin(row, kinds)}
    if made:
        offsets = np.cumsum([0, *(one["crops"].shape[:2].numel() for one in made)])
        inputs["pixel_values"] = torch.cat([one["crops"] for one in made])
        inputs["pooling"] = torch.cat([
            torch.where(one["pooling"] < 0, -1, one["pooling"] + int(offset))
            for one, offset in zip(made, offsets, strict=False)
        ])  # fmt: skip
        fine = row == config["image_patch_id"]
        inputs["places"] = (fine | (row == config["image_non_indexable_patch_id"])).nonzero()[:, 0]
        inputs["indexable"] = fine[inputs["places"]]
        inputs["order"] = (fine.long().cumsum(0) - 1)[inputs["places"]]
    return inputs
