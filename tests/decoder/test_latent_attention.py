"""Latent attention against keys and values that are written out for every head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from opsin.decoder import native
from opsin.decoder.attention import StepContext
from opsin.decoder.cache import CacheFormat, PagedCache, sequence_slots
from opsin.decoder.config import DecoderConfig, LatentAttentionConfig, LayerConfig, MLPConfig
from opsin.decoder.latent_attention import LatentAttention
from opsin.engine.loop import EngineLimits
from opsin.errors import InputError
from opsin.kernels import AttentionBatch, Kernels
from opsin.nn.rope import RopeConfig, RotaryAngles

HIDDEN, HEADS, PLAIN, TURNING, LATENT, VALUE = 20, 3, 6, 4, 28, 5
BLOCK = 8
ROPE = RopeConfig(TURNING, 100.0, pairs="adjacent")
PLAIN_QUERIES = LatentAttentionConfig(
    heads=HEADS,
    kv_heads=1,
    head_dim=TURNING + LATENT,
    rope=ROPE,
    latent=LATENT,
    plain_dim=PLAIN,
    value_dim=VALUE,
)
CONFIGS = {
    "plain": PLAIN_QUERIES,
    "through a vector": dataclasses.replace(
        PLAIN_QUERIES, query_rank=7, qkv_bias=True, out_bias=True, scale=0.3
    ),
    "window": dataclasses.replace(PLAIN_QUERIES, window=5),
}
CPU = torch.device("cpu")
WHOLE = CacheFormat()


def decoder_of(config: LatentAttentionConfig, layers: int = 1) -> DecoderConfig:
    layer = LayerConfig(config, MLPConfig(16))
    return DecoderConfig(16, HIDDEN, (layer,) * layers, 4096)


def filled(config: LatentAttentionConfig) -> LatentAttention:
    block = LatentAttention(Kernels(), config, 0, HIDDEN, 1e-6)
    generator = torch.Generator().manual_seed(3)
    for parameter in block.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return block


class Machine:
    """Sequences in one cache, each in blocks of its own that are no neighbours."""

    def __init__(self, config: LatentAttentionConfig, form: CacheFormat = WHOLE) -> None:
        self.block = filled(config)
        self.form = form
        self.cache = PagedCache(decoder_of(config), 12, BLOCK, torch.float32, CPU, form=form)
        self.tables = [[9, 2, 5, 7], [4, 11, 0, 6]]
        self.lengths = [0, 0]
        self.angles = RotaryAngles({ROPE}, CPU)

    def step(self, *parts: Tensor) -> list[Tensor]:
        """New tokens of both sequences at once."""
        layout, slots, places, starts, contexts = self.cache.layout, [], [], [0], []
        for i, part in enumerate(parts):
            first = self.lengths[i]
            self.lengths[i] += len(part)
            new = range(first, self.lengths[i])
            slots += [layout.slot(self.tables[i], token) for token in new]
            places += list(new)
            starts.append(starts[-1] + len(part))
            contexts.append(self.lengths[i])
        held = [
            sequence_slots(table, length, layout, CPU)
            for table, length in zip(self.tables, contexts, strict=True)
        ]
        batch = AttentionBatch(
            torch.tensor(slots),
            starts,
            contexts,
            [each.early for each in held],
            torch.tensor(self.tables),
            BLOCK,
            late_slots=[each.late for each in held],
        )
        positions = torch.tensor(places)[None]
        context = StepContext(self.cache, batch, positions, self.angles.at(positions))
        out = self.block(torch.cat(parts), context)
        return list(out.split([len(part) for part in parts]))


def written_out(block: LatentAttention, x: Tensor) -> Tensor:
    """One sequence from its beginning, every head with keys and values of its own."""
    config, kernels = block.config, Kernels()
    places = torch.arange(len(x))
    cos, sin = RotaryAngles({ROPE}, CPU).at(places[None])[ROPE]
    query = block._queries(x).unflatten(-1, (HEADS, -1))
    latent, common = block.latent(x).split((LATENT, TURNING), -1)
    latent = latent * (latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    latent = latent * block.latent_norm.weight
    maps = block.maps.weight.unflatten(0, (HEADS, -1))
    made = torch.einsum("tl,hrl->thr", latent, maps)
    turned = kernels.rope(common[:, None].contiguous(), cos, sin, "adjacent")
    key = torch.cat((made[..., :PLAIN], turned.expand(-1, HEADS, -1)), -1)
    own = kernels.rope(query[..., PLAIN:].contiguous(), cos, sin, "adjacent")
    query = torch.cat((query[..., :PLAIN], own), -1)
    scale = (PLAIN + TURNING) ** -0.5 if config.scale is None else config.scale
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    seen = places[None] <= places[:, None]
    if config.window is not None:
        seen &= places[None] > places[:, None] - config.window
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return block.out(torch.einsum("hqk,khd->qhd", weights, made[..., PLAIN:]).flatten(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_head_has_keys_and_values_of_its_own(name: str) -> None:
    """In pieces beside another sequence, above and below where they are written out."""
    assert 5 < CONFIGS[name].many <= 7
    machine = Machine(CONFIGS[name])
    one, two = torch.randn(2, 13, HIDDEN, generator=torch.Generator().manual_seed(4)).unbind(0)
    two = two[:9]
    pieces: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first, second in (((0, 5), (0, 1)), ((5, 6), (1, 8)), ((6, 13), (8, 9))):
        made = machine.step(one[slice(*first)], two[slice(*second)])
        for held, part in zip(pieces, made, strict=True):
            held.append(part)
    for x, held in zip((one, two), pieces, strict=True):
        expected = written_out(machine.block, x)
        torch.testing.assert_close(torch.cat(held), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.3)])
def test_the_vectors_may_be_quantised(bits: int, bound: float) -> None:
    """Within what the bits leave; the first block's tokens stay as they are."""
    machine = Machine(PLAIN_QUERIES, CacheFormat(bits, 32, start=2))
    x = torch.randn(13, HIDDEN, generator=torch.Generator().manual_seed(5))
    made, _ = machine.step(x, x[:1])
    expected = written_out(machine.block, x)
    early = machine.cache.layout.early_tokens
    torch.testing.assert_close(made[:early], expected[:early], atol=2e-5, rtol=1e-4)
    error = float((made - expected).abs().max() / expected.abs().max())
    assert 1e-5 < error < bound


def test_groups_that_do_not_fit_are_refused() -> None:
    config = dataclasses.replace(PLAIN_QUERIES, latent=68, head_dim=72)
    with pytest.raises(InputError, match="groups of 64 do not divide"):
        EngineLimits(kv_bits=8).cache_format(decoder_of(config))


def test_a_token_takes_one_row() -> None:
    config = decoder_of(PLAIN_QUERIES, layers=3)
    cache = PagedCache(config, 2, BLOCK, torch.float32, CPU)
    assert all(keys is values for keys, values in zip(cache.keys, cache.values, strict=True))
    taken = sum(keys.nbytes for keys in cache.keys if isinstance(keys, Tensor))
    assert taken == 2 * BLOCK * PagedCache.bytes_per_token(config, torch.float32)


def test_the_native_stack_leaves_it_alone() -> None:
    assert "latent" in native.why_not(decoder_of(PLAIN_QUERIES))
