"""The model's forward pass over packed images and conversations, sharing Transformers' weights.

Transformers' own class attends image by image in a Python loop; here every image and every
conversation of a batch lies end to end and one variable-length attention call serves them all.
tests/bundled compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLForConditionalGeneration

from training.bundled.page import PATCH, SLOTS

CODES = 96  # nothing, and the printable ASCII characters
Spans = tuple[Tensor, int]  # cumulative lengths, the longest


@dataclass
class Batch:
    """Packs joined on the device."""

    pixels: Tensor  # uint8, # (bytes,)
    images: Tensor  # (images, 6), see packing.pack
    tables: Tensor  # uint8, # (images, 3, 256)
    cells: Tensor  # uint8, # (visual tokens, SLOTS)
    patches: Tensor  # (3, patches): image, row, column
    ids: Tensor  # (tokens,)
    labels: Tensor
    weights: Tensor
    positions: Tensor  # (3, tokens)
    image_spans: Spans
    text_spans: Spans


def gather_patches(pixels: Tensor, images: Tensor, tables: Tensor, patches: Tensor) -> Tensor:
    """Normalised patches of a Batch's fields, # (patches, 768): channel, row, column."""
    image, row, column = patches.long()
    facts = images[image]  # (patches, 6)
    inner = torch.arange(PATCH, device=image.device)
    within = inner[:, None] * facts[:, 3, None, None] + inner  # (patches, 16, 16)
    corner = row * PATCH * facts[:, 3] + column * PATCH
    index = (facts[:, :3] + corner[:, None])[:, :, None, None] + within[:, None]
    level = pixels[index].long()  # (patches, 3, 16, 16)
    first = (image[:, None] * 3 + torch.arange(3, device=image.device)) * 256
    value = tables.flatten()[first[:, :, None, None] + level]
    return (value.to(torch.bfloat16) / 127.5 - 1).flatten(1)


def attend(query: Tensor, key: Tensor, value: Tensor, spans: Spans, causal: bool) -> Tensor:
    """Variable-length attention over # (tokens, heads, dim); a loop where there is no GPU."""
    cumulative, longest = spans
    if query.is_cuda:
        out = torch.ops.aten._flash_attention_forward(
            query, key, value, cumulative, cumulative, longest, longest, 0.0, causal, False
        )
        return out[0]
    edges = cumulative.tolist()
    parts = []
    for start, end in pairwise(edges):
        some = [part[start:end].transpose(0, 1)[None] for part in (query, key, value)]
        parts.append(functional.scaled_dot_product_attention(*some, is_causal=causal)[0])
    return torch.cat([part.transpose(0, 1) for part in parts])


def rotate(states: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions on # (tokens, heads, dim), halves convention."""
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (states * cosine[:, None] + turned * sine[:, None]).to(states.dtype)


def _root_norm(states: Tensor, weight: Tensor) -> Tensor:
    wide = states.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (scaled * weight.float()).to(torch.bfloat16 if states.is_cuda else states.dtype)


def vision_block(
    block: nn.Module, states: Tensor, cosine: Tensor, sine: Tensor, spans: Spans
) -> Tensor:
    """One layer of the image tower."""
    attention, mlp = block.attn, block.mlp
    heads = attention.num_heads
    fused = attention.qkv(block.norm1(states))
    query, key, value = fused.view(len(states), 3, heads, -1).unbind(1)
    mixed = attend(
        rotate(query, cosine, sine), rotate(key, cosine, sine), value.contiguous(), spans, False
    )
    states = states + attention.proj(mixed.flatten(1))
    wide = functional.gelu(mlp.linear_fc1(block.norm2(states)), approximate="tanh")
    return states + mlp.linear_fc2(wide)


def text_layer(
    layer: nn.Module, states: Tensor, cosine: Tensor, sine: Tensor, spans: Spans
) -> Tensor:
    """One layer of the decoder."""
    attention, mlp = layer.self_attn, layer.mlp
    normed = _root_norm(states, layer.input_layernorm.weight)
    count, dim = len(states), attention.head_dim
    query = _root_norm(attention.q_proj(normed).view(count, -1, dim), attention.q_norm.weight)
    key = _root_norm(attention.k_proj(normed).view(count, -1, dim), attention.k_norm.weight)
    value = attention.v_proj(normed).view(count, -1, dim)
    groups = query.shape[1] // key.shape[1]
    key = rotate(key, cosine, sine).repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    mixed = attend(rotate(query, cosine, sine), key, value, spans, True)
    states = states + attention.o_proj(mixed.flatten(1))
    normed = _root_norm(states, layer.post_attention_layernorm.weight)
    return states + mlp.down_proj(functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))


def _inverse_frequencies(dim: int, device: torch.device) -> Tensor:
    return 1.0 / (10000.0 ** (torch.arange(0, dim, 2, device=device).float() / dim))


class Packed(nn.Module):
    """Runs a Transformers model over a Batch, with a training-only head that reads each cell."""

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.cell_head = nn.Linear(config.vision_config.out_hidden_size, SLOTS * CODES)
        self.section = config.text_config.rope_parameters["mrope_section"]
        self.image_token = config.image_token_id
        self.vision_block: Callable[..., Tensor] = vision_block
        self.text_layer: Callable[..., Tensor] = text_layer
        self.gather_patches: Callable[..., Tensor] = gather_patches

    def compile_layers(self) -> None:
        """Compiles both kinds of layer and the cutting of patches, sizes left open."""
        self.gather_patches = torch.compile(gather_patches, dynamic=True)
        self.vision_block = torch.compile(vision_block, dynamic=True)
        self.text_layer = torch.compile(text_layer, dynamic=True)

    def _position_table(self, batch: Batch) -> Tensor:
        visual = self.model.model.visual
        side = visual.num_grid_per_side
        image, row, column = batch.patches.long()
        spread = batch.images[image, 4:6].float() - 1
        y, x = row * (side - 1) / spread[:, 0], column * (side - 1) / spread[:, 1]
        top, left = y.floor().long(), x.floor().long()
        bottom, right = (top + 1).clamp(max=side - 1), (left + 1).clamp(max=side - 1)
        dy, dx = (y - top)[:, None], (x - left)[:, None]
        grid = visual.pos_embed.weight
        upper = grid[top * side + left] * (1 - dx) + grid[top * side + right] * dx
        lower = grid[bottom * side + left] * (1 - dx) + grid[bottom * side + right] * dx
        return upper * (1 - dy) + lower * dy

    def encode_images(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Visual tokens and the deepstack features, # (visual tokens, hidden)."""
        visual = self.model.model.visual
        patches = self.gather_patches(batch.pixels, batch.images, batch.tables, batch.patches)
        proj = visual.patch_embed.proj
        kernel = proj.weight.sum(dim=2).flatten(1)  # a still picture shows both frames the same
        if not patches.is_cuda:
            patches = patches.to(kernel.dtype)
        states = functional.linear(patches, kernel, proj.bias) + self._position_table(batch)
        dim = states.shape[-1] // visual.blocks[0].attn.num_heads
        inverse = _inverse_frequencies(dim // 2, states.device)
        half = (batch.patches[1:, :, None] * inverse).transpose(0, 1).flatten(1)
        angles = torch.cat((half, half), dim=-1)
        cosine, sine = angles.cos(), angles.sin()
        if states.is_cuda:
            cosine, sine = cosine.bfloat16(), sine.bfloat16()
        deep = []
        for index, block in enumerate(visual.blocks):
            states = self.vision_block(block, states, cosine, sine, batch.image_spans)
            if index in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(index)]
                deep.append(merger(states))
        return visual.merger(states), deep

    def _text_angles(self, positions: Tensor, dim: int) -> Tensor:
        inverse = _inverse_frequencies(dim, positions.device)
        angles = positions[..., None].float() * inverse  # (3, tokens, dim / 2)
        mixed = angles[0].clone()
        for axis in (1, 2):
            chosen = slice(axis, self.section[axis] * 3, 3)
            mixed[:, chosen] = angles[axis][:, chosen]
        return torch.cat((mixed, mixed), dim=-1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states of every token after the last norm, and the visual tokens."""
        text = self.model.model.language_model
        visual, deep = self.encode_images(batch)
        states = functional.embedding(batch.ids, text.embed_tokens.weight)
        where = (batch.ids == self.image_token).nonzero()[:, 0]
        states = states.index_copy(0, where, visual.to(states.dtype))
        angles = self._text_angles(batch.positions, text.layers[0].self_attn.head_dim)
        cosine, sine = angles.cos(), angles.sin()
        if states.is_cuda:
            cosine, sine = cosine.bfloat16(), sine.bfloat16()
        for index, layer in enumerate(text.layers):
            states = self.text_layer(layer, states, cosine, sine, batch.text_spans)
            if index < len(deep):
                states = states.index_add(0, where, deep[index].to(states.dtype))
        return _root_norm(states, text.norm.weight), visual

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Next-token loss (weighted mean), cell loss, and the share of right next tokens."""
        states, visual = self(batch)
        following = torch.roll(batch.labels, -1)
        chosen = (following >= 0).nonzero()[:, 0]
        target = following[chosen]
        weight = torch.roll(batch.weights, -1)[chosen]
        head = self.model.model.language_model.embed_tokens.weight
        logits = functional.linear(states[chosen], head).float()
        loss = functional.cross_entropy(logits, target, reduction="none")
        loss = (loss * weight).sum() / weight.sum()
        right = (logits.detach().argmax(-1) == target).float().mean()
        guess = self.cell_head(visual).float().view(-1, CODES)
        truth = batch.cells.flatten().long()
        cell_weight = torch.where(truth > 0, 1.0, 0.1)
        cell = functional.cross_entropy(guess, truth, reduction="none")
        return loss, (cell * cell_weight).sum() / cell_weight.sum(), right
