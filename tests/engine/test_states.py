"""Layers that keep a state or encoded media a sequence: right whatever runs beside, lost never."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opsin.decoder.cache import PagedCache
from opsin.decoder.config import (
    AttentionConfig,
    CrossAttentionConfig,
    DecoderConfig,
    DeltaNetConfig,
    GroupedMoEConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
)
from opsin.decoder.cross_attention import CrossLayer
from opsin.decoder.decoder import Decoder
from opsin.engine.blocks import BlockPool
from opsin.engine.plan import CachePlan
from opsin.engine.runner import Runner
from opsin.engine.scheduler import Scheduler
from opsin.engine.sequence import Sequence
from opsin.errors import InputError
from opsin.families.base import Encoded, MediaInput, Prompt, SourceViews
from opsin.kernels import Kernels
from opsin.nn.rope import RopeConfig
from opsin.types import SamplingParams

BLOCK = 4
HIDDEN = 24
VOCAB = 40
ROWS = 6  # of encoded media, a picture
WANTED = 5  # tokens that every sequence generates


def config(*, states: bool = True, sources: bool = True) -> DecoderConfig:
    attention = AttentionConfig(4, 2, 6, RopeConfig(6, 1e4), chunk=7, temperature=(4.0, 0.1, 0))
    delta = DeltaNetConfig(key_heads=2, value_heads=4, key_dim=6, value_dim=5, conv_kernel=4)
    cross = CrossAttentionConfig(4, 2, 6, qk_norm="rms")
    mlp = MLPConfig(20)
    experts = MoEConfig(experts=4, top_k=2, hidden=8, shared=mlp, shared_gate=True)
    grouped = GroupedMoEConfig((experts, experts), selection_bias=True)
    layers = [LayerConfig(attention, grouped), LayerConfig(attention, mlp)]
    if states:
        layers = [LayerConfig(delta, mlp), layers[0], LayerConfig(delta, experts), layers[1]]
    if sources:
        layers.insert(2, LayerConfig(cross, mlp))
    return DecoderConfig(VOCAB, HIDDEN, tuple(layers), max_positions=4096)


def model(shape: DecoderConfig) -> Any:
    """A decoder with random weights, and a family whose pictures are their keys' noise."""
    decoder = Decoder(Kernels(), shape)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.6 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        parameter.data = noise * scale + (1.0 if "norm" in name else 0.0)
    for module in decoder.modules():
        finish = getattr(module, "finish_loading", None)
        if finish is not None:
            finish()

    def encode(towers: object, items: SequenceOf[MediaInput]) -> list[Encoded]:
        seeds = [torch.Generator().manual_seed(item.key[0]) for item in items]
        return [Encoded(None, source=torch.randn(ROWS, HIDDEN, generator=seed)) for seed in seeds]

    family = SimpleNamespace(encode=encode)
    device = torch.device("cpu")
    return SimpleNamespace(decoder=decoder, family=family, towers=None, device=device)


def prompt(number: int, length: int, pictures: int, *, last: bool = False) -> Prompt:
    """Random tokens with pictures among them, or at the end."""
    rng = random.Random(number)
    ids = [rng.randrange(VOCAB) for _ in range(length)]
    places = sorted(rng.sample(range(length - pictures if last else 0, length), pictures))
    media = [
        MediaInput(
            "image", {}, "", 1, key=bytes([number * 8 + i]), indices=torch.tensor([place]),
            source_tokens=ROWS,
        )
        for i, place in enumerate(places)
    ]  # fmt: skip
    views = None
    if media:
        view_of = torch.full((length,), -1)
        rows = torch.zeros(pictures, pictures * ROWS, dtype=torch.bool)
        for i, place in enumerate(places):
            view_of[place:] = i
            rows[i, i * ROWS : (i + 1) * ROWS - i % 2] = True
        views = SourceViews(rows, view_of)
    groups = torch.tensor([rng.randrange(2) for _ in ids]) if number % 3 else None
    positions = torch.arange(length)[None]
    return Prompt(ids, positions, length, media, source=views, expert_groups=groups)


def run(
    toy: Any,
    prompts: SequenceOf[Prompt],
    *,
    blocks: int = 200,
    sources: int = 60,
    seqs: int = 8,
    budget: int = 10_000,
    cancelled: SequenceOf[int] = (),
) -> tuple[list[list[int]], int]:
    """What every prompt is answered, and how many sequences had to start again."""
    pools = BlockPool(blocks), BlockPool(sources)
    plan = Scheduler(
        pools[0],
        BLOCK,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        source_pool=pools[1],
        prefix_cache=False,
    )
    shape = toy.decoder.config
    device = torch.device("cpu")
    cache = PagedCache(shape, blocks, BLOCK, torch.float32, device, seqs, sources)
    for states in cache.states:
        for state in states:
            state.fill_(torch.nan)  # what is not emptied before use shows
    runner = Runner(toy, cache)
    sequences = [Sequence.start(i, item, SamplingParams()) for i, item in enumerate(prompts)]
    for sequence in sequences:
        plan.add(sequence)
    turn = 0
    while plan.has_work:
        step = plan.schedule()
        plan.check_integrity()
        logits, _ = runner.run(step)
        assert not logits.isnan().any()
        plan.computed(step)
        sampled = [scheduled.sequence for scheduled in step if scheduled.samples]
        for sequence, row in zip(sampled, logits, strict=True):
            sequence.token_ids.append(int(row.argmax()))
            if sequence.num_generated == WANTED:
                plan.finish(sequence)
        turn += 1
        if turn == 2:
            for number in cancelled:
                if sequences[number].num_generated < WANTED:
                    plan.finish(sequences[number])
    assert (pools[0].num_free, pools[1].num_free) == (blocks, sources)
    restarts = sum(sequence.num_preemptions for sequence in sequences)
    return [sequence.output_ids for sequence in sequences], restarts


@pytest.mark.parametrize("seed", range(4))
def test_a_sequence_is_answered_as_alone_whatever_runs_beside(seed: int) -> None:
    rng = random.Random(seed)
    toy = model(config())
    prompts = [prompt(i, rng.randrange(3, 40), rng.randrange(0, 3)) for i in range(7)]
    alone = [run(toy, [item])[0][0] for item in prompts]
    together, _ = run(toy, prompts)
    assert together == alone
    chunked, _ = run(toy, prompts, budget=rng.randrange(1, 9), seqs=3)
    assert chunked == alone
    tight, _ = run(toy, prompts, blocks=12, sources=6, seqs=5, budget=29)
    assert tight == alone
    left = [number for number in range(7) if number not in (1, 4)]
    some, _ = run(toy, prompts, seqs=3, budget=11, cancelled=(1, 4))
    assert [some[number] for number in left] == [alone[number] for number in left]


def test_a_sequence_that_gave_way_starts_again_from_nothing() -> None:
    toy = model(config())
    prompts = [prompt(number, 20, 1) for number in range(3)]
    alone = [run(toy, [item])[0][0] for item in prompts]
    tight, restarts = run(toy, prompts, blocks=16)
    assert tight == alone
    assert restarts > 0


def test_text_beside_a_picture_passes_its_layers_unread() -> None:
    toy = model(config())
    words = prompt(3, 12, 0)
    alone = run(toy, [words])[0][0]
    assert run(toy, [words, prompt(5, 9, 2)])[0][0] == alone
    for layer in toy.decoder.layers:
        if isinstance(layer, CrossLayer):
            layer.attention_gate.data.fill_(100.0)
    assert run(toy, [words, prompt(5, 9, 2)])[0][0] == alone


def test_another_picture_is_read() -> None:
    toy = model(config(states=False))
    one, other = prompt(4, 10, 1), prompt(4, 10, 1)
    other.media[0].key = bytes([200])
    assert run(toy, [one])[0] != run(toy, [other])[0]


def test_blocks_of_a_sequence_with_a_source_are_not_reused() -> None:
    """Its first tokens depend on a picture that comes later."""
    pool = BlockPool(20)
    plan = Scheduler(
        pool, BLOCK, max_num_seqs=2, max_num_batched_tokens=64, source_pool=BlockPool(4)
    )
    seen = prompt(4, 12, 1, last=True)
    words = Prompt(list(seen.token_ids), seen.positions, 12)
    for item in (seen, words):
        sequence = Sequence.start(0, item, SamplingParams())
        plan.add(sequence)
        step = plan.schedule()
        assert (step[0].start, step[0].end) == (0, 12)
        plan.computed(step)
        plan.finish(sequence)


def test_the_memory_is_shared_out_among_what_layers_keep() -> None:
    shape = config()
    per_slot = PagedCache.bytes_per_state_slot(shape, torch.float32)
    conv, memory = 3 * (2 * 12 + 20), 4 * 6 * 5
    assert per_slot == 2 * (conv + memory) * 4
    memory = 40 * per_slot
    limits = {"block_size": BLOCK, "max_num_seqs": 64, "max_context": 1 << 20}
    plan = CachePlan.of(shape, torch.float32, memory, **limits)
    assert plan.num_state_slots == 20
    used = plan.num_state_slots * per_slot
    used += plan.num_blocks * BLOCK * PagedCache.bytes_per_token(shape, torch.float32)
    used += plan.num_source_blocks * BLOCK * PagedCache.bytes_per_source_token(shape, torch.float32)
    slack = BLOCK * PagedCache.bytes_per_token(shape, torch.float32)
    assert memory - slack <= used <= memory + slack
    plain = config(states=False, sources=False)
    plan = CachePlan.of(plain, torch.float32, memory, **limits)
    assert (plan.num_state_slots, plan.num_source_blocks) == (64, 0)
    with pytest.raises(InputError, match="too small"):
        CachePlan.of(shape, torch.float32, per_slot, **limits)
