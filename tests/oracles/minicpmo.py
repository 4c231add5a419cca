"""MiniCPM-o 4.5 and 2.6, after OpenBMB's modeling, processing, image-processing and navit-SigLIP
files (`*_minicpmo.py`, `*_minicpmv.py`), read beside vLLM's and vLLM-Omni's, SGLang's and
Transformers' MiniCPM-V 4.6.

Where they differ:

- The resampler of both models has its positions on the keys. vLLM builds 4.5 with the resampler of
  MiniCPM-V 4.5, which puts them on the values; the authors' file, vLLM-Omni and SGLang do not.
- The authors' `chat` joins the parts of a message with line breaks, so this does; their omni mode
  with nothing.
- With sounds in a message, `chat` asks for speech: it ends the prompt with `<|tts_bos|>` (and, in
  2.6, a place for a voice). vLLM does so on request alone. Answers here are text, so this does not.
- `chat` passes `enable_thinking=False`; servers leave it to the template's default, as this does.
- 2.6 marks each second of a sound (`chunk_input`, on in its `chat`); 4.5 a whole sound, unless it
  streams. vLLM marks seconds in both.
- `chat` glues the sounds of one message together before the encoder hears them
  (`merge_audio_from_same_content`) and pads all to the longest; vLLM takes each sound alone, and so
  does this. Of one sound both make the same.

The voice that answers (`tts`) is in the checkpoints and unused; one of its tensors stands for it.
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
from transformers import WhisperFeatureExtractor

RATE = 16000


class Group(nn.Module):
    """Named modules and parameters."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)


def is_later(c: dict[str, Any]) -> bool:
    """4.5 (Qwen3) and not 2.6 (Qwen2)."""
    return str(c["version"]) == "4.5"


def see_all(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, bias: Any = 0.0) -> Any:
    """Attention of (tokens, width) rows; `bias` is added to the scores."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def attention_parts(d: int, key_bias: bool = True) -> Group:
    return Group(
        k_proj=nn.Linear(d, d, bias=key_bias), v_proj=nn.Linear(d, d), q_proj=nn.Linear(d, d),
        out_proj=nn.Linear(d, d),
    )  # fmt: skip


class VisionLayer(nn.Module):
    def __init__(self, v: dict[str, Any]) -> None:
        super().__init__()
        d, self.heads = v["hidden_size"], v["num_attention_heads"]
        self.self_attn = attention_parts(d)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(d, eps=1e-6), nn.LayerNorm(d, eps=1e-6)
        wide = v["intermediate_size"]
        self.mlp = Group(fc1=nn.Linear(d, wide), fc2=nn.Linear(wide, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, a = self.layer_norm1(x), self.self_attn
        x = x + a.out_proj(see_all(a.q_proj(h), a.k_proj(h), a.v_proj(h), self.heads))
        h = F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp.fc2(h)


class Vision(nn.Module):
    """SigLIP; a patch's position is its place in the picture, in steps of the table's grid."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        v = c["vision_config"]
        d, self.side = v["hidden_size"], v["image_size"] // v["patch_size"]
        self.embeddings = Group(
            patch_embedding=nn.Conv2d(3, d, v["patch_size"], v["patch_size"]),
            position_embedding=nn.Embedding(self.side**2, d),
        )
        count = v["num_hidden_layers"] - bool(c["drop_vision_last_layer"])
        self.encoder = Group(layers=nn.ModuleList(VisionLayer(v) for _ in range(count)))
        self.post_layernorm = nn.LayerNorm(d, eps=1e-6)

    def forward(self, strip: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        bounds = torch.arange(1 / self.side, 1.0, 1 / self.side)
        down, right = (
            torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / n), bounds, right=True)
            for n in (rows, columns)
        )
        places = (down[:, None] * self.side + right).flatten()
        x = self.embeddings.patch_embedding(strip[None])[0].flatten(1).T
        x = x + self.embeddings.position_embedding(places)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


def waves(width: int, at: np.ndarray) -> np.ndarray:
    """Sines, then cosines.  # (places,) -> (places, width)"""
    speeds = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float32) / (width / 2.0))
    angles = np.outer(at, speeds)
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1)


class Resampler(nn.Module):
    def __init__(self, queries: int, d: int, seen: int) -> None:
        super().__init__()
        self.heads = d // 128
        self.query, self.proj = nn.Parameter(torch.zeros(queries, d)), nn.Parameter(torch.eye(d))
        self.kv_proj = nn.Linear(seen, d, bias=False)
        self.attn = Group(
            in_proj_weight=torch.zeros(3 * d, d),
            in_proj_bias=torch.zeros(3 * d),
            out_proj=nn.Linear(d, d),
        )
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(d, eps=1e-6) for _ in range(3))

    def forward(self, x: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        d = len(self.proj)
        y, x_at = np.divmod(np.arange(rows * columns, dtype=np.float32), columns)
        where = np.concatenate((waves(d // 2, x_at), waves(d // 2, y)), axis=1)
        x = self.ln_kv(self.kv_proj(x))
        parts = (self.ln_q(self.query), x + torch.from_numpy(where).float(), x)
        weights, biases = self.attn.in_proj_weight.chunk(3), self.attn.in_proj_bias.chunk(3)
        q, k, v = (F.linear(*one) for one in zip(parts, weights, biases, strict=True))
        return self.ln_post(self.attn.out_proj(see_all(q, k, v, self.heads))) @ self.proj


class SoundLayer(nn.Module):
    def __init__(self, a: dict[str, Any]) -> None:
        super().__init__()
        d, self.heads = a["d_model"], a["encoder_attention_heads"]
        self.self_attn = attention_parts(d, key_bias=False)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.fc1 = nn.Linear(d, a["encoder_ffn_dim"])
        self.fc2 = nn.Linear(a["encoder_ffn_dim"], d)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        h, a = self.self_attn_layer_norm(x), self.self_attn
        x = x + a.out_proj(see_all(a.q_proj(h), a.k_proj(h), a.v_proj(h), self.heads, bias))
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class Sound(nn.Module):
    """Whisper's encoder; a vector sees those of its own stretch and of the earlier ones."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        a = c["audio_config"]
        d, self.stretch = a["d_model"], int(c["audio_chunk_length"] * 50)
        self.conv1 = nn.Conv1d(a["num_mel_bins"], d, 3, padding=1)
        self.conv2 = nn.Conv1d(d, d, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(a["max_source_positions"], d)
        self.layers = nn.ModuleList(SoundLayer(a) for _ in range(a["encoder_layers"]))
        self.layer_norm = nn.LayerNorm(d)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel[None]))))[0].T
        x = x + self.embed_positions.weight[: len(x)]
        bias = torch.full((len(x), len(x)), -math.inf)
        for i in range(len(x)):
            bias[i, : (i // self.stretch + 1) * self.stretch] = 0
        for layer in self.layers:
            x = layer(x, bias)
        return self.layer_norm(x)


class Norm(nn.Module):
    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class Layer(nn.Module):
    """Qwen3's: norms of each head's queries and keys; Qwen2's: biases of all three."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d, wide, eps = c["hidden_size"], c["intermediate_size"], c["rms_norm_eps"]
        self.heads, self.shared = c["num_attention_heads"], c["num_key_value_heads"]
        self.dim, self.normed = c.get("head_dim", d // self.heads), is_later(c)
        own, shared, bias = self.heads * self.dim, self.shared * self.dim, not self.normed
        self.self_attn = Group(
            q_proj=nn.Linear(d, own, bias=bias),
            k_proj=nn.Linear(d, shared, bias=bias),
            v_proj=nn.Linear(d, shared, bias=bias),
            o_proj=nn.Linear(own, d, bias=False),
        )
        if self.normed:
            self.self_attn.q_norm = Norm(self.dim, eps)
            self.self_attn.k_norm = Norm(self.dim, eps)
        self.mlp = Group(
            gate_proj=nn.Linear(d, wide, bias=False),
            up_proj=nn.Linear(d, wide, bias=False),
            down_proj=nn.Linear(wide, d, bias=False),
        )
        self.input_layernorm, self.post_attention_layernorm = Norm(d, eps), Norm(d, eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h, a = self.input_layernorm(x), self.self_attn
        q, k, v = (p(h).unflatten(-1, (-1, self.dim)) for p in (a.q_proj, a.k_proj, a.v_proj))
        if self.normed:
            q, k = a.q_norm(q), a.k_norm(k)
        turned = []
        for p in (q, k):
            first, second = p.chunk(2, -1)
            turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin), -1))
        k, v = (p.repeat_interleave(self.heads // self.shared, 1) for p in (turned[1], v))
        past = torch.full((len(x), len(x)), -math.inf).triu(1)
        x = x + a.o_proj(
            see_all(turned[0].flatten(1), k.flatten(1), v.flatten(1), self.heads, past)
        )
        h, m = self.post_attention_layernorm(x), self.mlp
        return x + m.down_proj(F.silu(m.gate_proj(h)) * m.up_proj(h))


class MiniCPMO(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.c, d = c, c["hidden_size"]
        self.llm = Group(
            model=Group(
                embed_tokens=nn.Embedding(c["vocab_size"], d),
                layers=nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
                norm=Norm(d, c["rms_norm_eps"]),
            ),
            lm_head=nn.Linear(d, c["vocab_size"], bias=False),
        )
        self.vpm = Vision(c)
        self.resampler = Resampler(c["query_num"], d, c["vision_config"]["hidden_size"])
        self.apm = Sound(c)
        heard = c["audio_config"]["encoder_ffn_dim"] // 4
        self.audio_projection_layer = Group(linear1=nn.Linear(heard, d), linear2=nn.Linear(d, d))
        self.tts = Group(emb_text=nn.Embedding(4, 8))
        self.known: tuple[Any, Any] = (None, None)  # the last media, and what they became

    def media(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """What stands in the places of the pictures' views, then of the sounds."""
        found, p = [], self.audio_projection_layer
        for strip, (rows, columns) in zip(inputs["strips"], inputs["tgt_sizes"], strict=True):
            found.append(self.resampler(self.vpm(strip, rows, columns), rows, columns))
        for mel in inputs["mels"]:
            x = p.linear2(F.relu(p.linear1(self.apm(mel))))
            found.append(F.avg_pool1d(x.T[None], self.c["audio_pool_step"])[0].T)
        return found

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        ids, c = inputs["input_ids"][0], self.c
        x = self.llm.model.embed_tokens(ids)
        if len(inputs["places"]):
            if self.known[0] is not inputs["strips"]:
                self.known = (inputs["strips"], torch.cat(self.media(inputs)))
            x = x.clone()
            x[inputs["places"]] = self.known[1]
        dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
        speeds = c["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim)
        angles = torch.outer(torch.arange(len(ids)).float(), speeds)[:, None]
        for layer in self.llm.model.layers:
            x = layer(x, angles.cos(), angles.sin())
        return self.llm.lm_head(self.llm.model.norm(x))


def build(config: dict[str, Any]) -> nn.Module:
    return MiniCPMO(config)


class Slicer:
    """The authors' image processor, by their names."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.most = settings.get("max_slice_nums", 9)
        self.scale = settings.get("scale_resolution", 448)
        self.patch = settings.get("patch_size", 14)
        self.mean = settings.get("norm_mean", [0.5, 0.5, 0.5])
        self.std = settings.get("norm_std", [0.5, 0.5, 0.5])

    @staticmethod
    def ensure_divide(length: float, by: int) -> int:
        return max(round(length / by) * by, by)

    def find_best_resize(self, width: float, height: float, upscale: bool) -> tuple[int, int]:
        if width * height > self.scale * self.scale or upscale:
            ratio = width / height
            height = int(self.scale / math.sqrt(ratio))
            width = int(height * ratio)
        return self.ensure_divide(width, self.patch), self.ensure_divide(height, self.patch)

    def grid(self, width: int, height: int) -> tuple[int, int] | None:
        """(columns, rows), or None for a picture that is small enough."""
        multiple = min(math.ceil(width * height / (self.scale * self.scale)), self.most)
        if multiple <= 1:
            return None
        best, least = (1, 1), math.inf
        for count in (multiple - 1, multiple, multiple + 1):
            if count == 1 or count > self.most:
                continue
            for columns in range(1, count + 1):
                if count % columns == 0:
                    error = abs(math.log(width / height) - math.log(columns / (count // columns)))
                    if error < least:
                        best, least = (columns, count // columns), error
        return best

    def views(self, image: Image.Image) -> list[Image.Image]:
        """The whole, then the slices row by row."""
        image = image.convert("RGB")
        grid = self.grid(*image.size)
        whole = image.resize(self.find_best_resize(*image.size, grid is None), 3)
        if grid is None:
            return [whole]
        columns, rows = grid
        width = self.ensure_divide(image.width, columns) / columns
        height = self.ensure_divide(image.height, rows) / rows
        w, h = self.find_best_resize(width, height, True)
        refined = image.resize((w * columns, h * rows), 3)
        return [whole] + [
            refined.crop((j * w, i * h, (j + 1) * w, (i + 1) * h))
            for i in range(rows)
            for j in range(columns)
        ]

    def strip(self, view: Image.Image) -> torch.Tensor:
        """A view's patches side by side.  # (3, patch, patches * patch)"""
        x = torch.from_numpy(np.asarray(view, dtype=np.float32) / 255)
        x = ((x - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1)
        rows = x.split(self.patch, 1)
        return torch.cat(rows, 2)


def marks(length: int, step: int, seconds: bool) -> str:
    """What stands for a sound of so many samples."""
    frames = math.ceil(length / 160)
    count = ((frames - 1) // 2 + 1 - step) // step + 1
    each = (50 - step) // step + 1 if seconds else count
    spans = [min(each, count - start) for start in range(0, count, each)]
    return "".join(f"<|audio_start|>{'<unk>' * span}<|audio_end|>" for span in spans)


def picture_text(number: int, grid: tuple[int, int] | None, queries: int, numbered: bool) -> str:
    text = "<image>" + "<unk>" * queries + "</image>"
    if numbered:
        text = f"<image_id>{number}</image_id>{text}"
    if grid is not None:
        slices = ("<slice>" + "<unk>" * queries + "</slice>") * grid[0]
        text += "\n".join([slices] * grid[1])
    return text


def places_between(ids: list[int], starts: set[int], ends: set[int]) -> list[int]:
    """The positions between each start and its end."""
    found: list[int] = []
    begun = -1
    for position, one in enumerate(ids):
        if one in starts:
            begun = position + 1
        elif one in ends:
            found += range(begun, position)
    return found


def flat_messages(messages: list[dict[str, Any]], later: bool) -> list[dict[str, str]]:
    named = {"image": "<image>./</image>", "audio": "<audio>./</audio>"}
    if not later:
        named = {kind: f"({text})" for kind, text in named.items()}
    return [
        {
            "role": message["role"],
            "content": "\n".join(
                named.get(part["type"]) or part["text"] for part in message["content"]
            ),
        }
        for message in messages
    ]


def encode(
    folder: Path,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    audio: list[Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | options
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    later, slicer = is_later(config), Slicer(settings)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(template).render(
        messages=flat_messages(messages, later), add_generation_prompt=True
    )
    shown = [
        picture_text(
            number, slicer.grid(*image.size), config["query_num"], settings.get("use_image_id")
        )
        for number, image in enumerate(images)
    ]
    heard = [marks(len(one), config["audio_pool_step"], not later) for one in audio]
    for name, made in (("image", shown), ("audio", heard)):
        waiting = iter(made)
        pattern = f"<{name}>./</{name}>" if later else rf"\(<{name}>./</{name}>\)"
        text = re.sub(pattern, lambda _: next(waiting), text)  # noqa: B023
    ids = tokenizer.encode(text).ids
    mark = tokenizer.token_to_id
    places = places_between(
        ids, {mark("<image>"), mark("<slice>")}, {mark("</image>"), mark("</slice>")}
    ) + places_between(ids, {mark("<|audio_start|>")}, {mark("<|audio_end|>")})
    views = [view for image in images for view in slicer.views(image)]
    strips = [slicer.strip(view) for view in views]
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "places": torch.tensor(places, dtype=torch.long),
        "strips": strips,
        "tgt_sizes": [(v.height // slicer.patch, v.width // slicer.patch) for v in views],
        "mels": [mel for one in audio for mel in mels(one)],
    }
    if strips:
        # The same values, a patch a row: what other ports keep and a comparison can read.
        strip = torch.cat(strips, 2).unflatten(2, (-1, slicer.patch))
        inputs["pixel_values"] = strip.permute(2, 0, 1, 3).flatten(1)
    return inputs


def mels(samples: np.ndarray) -> list[torch.Tensor]:
    """Whisper's features of each thirty seconds, without those of the padding."""
    extractor, found = WhisperFeatureExtractor(feature_size=80), []
    for start in range(0, len(samples), 30 * RATE):
        made = extractor(
            samples[start : start + 30 * RATE],
            sampling_rate=RATE,
            return_attention_mask=True,
            return_tensors="pt",
        )
        found.append(made["input_features"][0, :, : int(made["attention_mask"].sum())])
    return found
